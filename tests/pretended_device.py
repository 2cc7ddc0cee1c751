"""An accelerator made of the processor, to find out without one what would not run on one.

- torch takes it for a device of its own, `pretend`: what lies there is a `Far`, and the processor computes with the
  tensor inside. A real device refuses to compute with a tensor that lies elsewhere, and so does this one
- where torch has several ways it goes the plain one here, so numbers are the processor's up to rounding
- it stays registered for the whole process: tests have it in a process of their own
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
COMPUTED: list[str] = []  # the operators, in order
# These make an empty tensor and let it grow, which a Far cannot.
GROWING = ("arange.default", "arange.start", "arange.start_step", "linspace.default", "eye.default", "randperm.default")


class Module:
    """What torch asks of a device's module."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=0: torch.empty(0, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=0: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend("pretend", backend_module=Module())
DEVICE = torch.device("pretend", 0)


class Far(Tensor):
    """A tensor on the device; `near` is the one it stands for."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        """As if it lay on the device."""
        found: Far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.size(), near.stride(), near.storage_offset(), dtype=near.dtype, device=DEVICE
        )
        found.near = near
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch has these few turn into tensors, or lists, past the dispatcher."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.tolist:
                return args[0].near.tolist()
            if func is Tensor.new_tensor:
                return tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype), device=DEVICE)
            if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Far):
                key = args[1] if isinstance(args[1], tuple) else (args[1],)
                args = (args[0], tuple(tensor(k, device=DEVICE) if isinstance(k, list) else k for k in key), *args[2:])
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `computed`."""
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `func` gives on the device. Raises RuntimeError for tensors of both devices, as CUDA does."""
    COMPUTED.append(str(func))
    if func is aten._to_copy.default:
        found = func(_near(args[0]), **{**kwargs, "device": "cpu"})
        return Far(found) if torch.device(kwargs.get("device") or args[0].device) == DEVICE else found
    if func is aten.copy_.default:
        _near(args[0]).copy_(_near(args[1]))
        return args[0]
    if func is aten._local_scalar_dense.default:
        return func(args[0].near)
    for given in tree_leaves((args, dict(kwargs))):  # CUDA takes numbers, and indices, from elsewhere
        if isinstance(given, Tensor) and not isinstance(given, Far) and given.dim() and func not in INDEXING:
            raise RuntimeError(f"{func} of tensors on {DEVICE} and one of {tuple(given.shape)} on cpu")
    if func in INDEXING and not isinstance(args[0], Far):
        raise RuntimeError(f"{func} of a tensor on cpu with indices on {DEVICE}")
    here = {**kwargs, "device": "cpu"} if kwargs.get("device") is not None else kwargs
    found = func(*tree_map(_near, list(args)), **tree_map(_near, dict(here)))
    returned = func._schema.returns
    if returned and returned[0].alias_info is not None and returned[0].alias_info.is_write:
        return kwargs.get("out", args[0])
    return tree_map(lambda each: Far(each) if isinstance(each, Tensor) else each, found)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
    """`torch.tensor`, which cannot make a Far itself."""
    found = _tensor(data, **settings)
    return found if device is None else found.to(device)


def _computing(func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: computed(func, args, kwargs)


_tensor = torch.tensor
torch.tensor = tensor
torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]  # its tensors cannot be wrapped
# So that tied weights stay tied: `Module.to` makes new parameters where it cannot put a Far into the old.
torch.__future__.set_swap_module_params_on_conversion(True)
_kernels = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_kernels[0].fallback(lambda func, *args, **kwargs: computed(func, args, kwargs), "PrivateUse1")
for _name in GROWING:
    _operator, _overload = _name.split(".")
    _kernel = _computing(getattr(getattr(aten, _operator), _overload))
    _kernels[1].impl(_name.removesuffix(".default"), _kernel, "PrivateUse1")
