import pytest
import torch
import torch.nn.functional as F

from stages.nn import attention, masking
from stages.nn.attention import Layer, StackCache, View, initialise
from stages.nn.masking import Blocks, causal_mask

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8


def heads(number: int, positions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, number, positions, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def some_layer() -> Layer:
    torch.manual_seed(0)
    made = Layer(32, 24, HEADS, KEY_HEADS, 1e-5)
    initialise(made, 1, std=0.5)
    return made


def test_the_mask_allows_what_is_not_later_and_in_the_window() -> None:
    assert causal_mask(torch.tensor([2, 3]), torch.arange(5)).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert causal_mask(torch.tensor([2, 3]), torch.arange(5), 2).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]


@pytest.mark.parametrize("before", [0, 1, 30, 300])
@pytest.mark.parametrize("window", [None, 1, 2, 64, 65, 100, 1000])
def test_blocks_find_what_one_mask_finds(window: int | None, before: int) -> None:
    position_S = torch.arange(before + 517)
    position_T = position_S[before:]
    q, k, v = heads(HEADS, 517), heads(KEY_HEADS, len(position_S), 1), heads(KEY_HEADS, len(position_S), 2)
    mask = causal_mask(position_T, position_S, window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    found = Blocks(position_T, position_S, window, 1).attend(q, k, v)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 30, 90])
@pytest.mark.parametrize("per_position", [2, 3, 7])
def test_what_shares_a_position_sees_all_of_it_across_blocks(window: int | None, per_position: int) -> None:
    position_S = torch.arange(200).repeat_interleave(per_position)
    position_T = position_S[40 * per_position :]
    q, k, v = heads(HEADS, len(position_T)), heads(HEADS, len(position_S), 1), heads(HEADS, len(position_S), 2)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(position_T, position_S, window))
    found = Blocks(position_T, position_S, window, per_position).attend(q, k, v)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_gradients_through_blocks_are_those_through_one_mask(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_BTD = torch.randn(1, 300, 32, dtype=torch.float64)

    def gradients(uncut: int) -> list[torch.Tensor]:
        monkeypatch.setattr(attention, "UNCUT", uncut)
        layer, own = some_layer().double(), x_BTD.clone().requires_grad_()
        view = View(torch.arange(300), HEAD_DIM, 100.0, window=window, square=window is not None, per_position=1)
        assert (view.mask_TS is None) == (uncut < 300)
        layer(own, view).square().sum().backward()
        return [own.grad, *(parameter.grad for parameter in layer.parameters())]

    for whole, cut in zip(gradients(1000), gradients(256), strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-9, rtol=1e-9)


def test_up_to_256_positions_share_one_mask_and_more_build_none_of_them_all() -> None:
    views = {length: View(torch.arange(length), HEAD_DIM, 100.0, window=64) for length in (256, 257)}
    assert views[256].mask_TS is not None and views[256].blocks is None
    assert views[257].mask_TS is None and views[257].blocks is not None


@pytest.mark.parametrize("window", [None, 64])
def test_no_block_takes_a_mask_of_all_positions(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[torch.Size] = []
    plain = masking.attend

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        sizes.append(mask.shape)
        return plain(q, k, v, mask)

    monkeypatch.setattr(masking, "attend", watched)
    for positions in (1024, 4096):
        sizes.clear()
        position_T = torch.arange(positions)
        Blocks(position_T, position_T, window, 1).attend(*(heads(1, positions, seed) for seed in range(3)))
        largest = max(queries * keys for queries, keys in sizes)
        assert largest <= (256 * positions if window is None else 2 * 64 * 64)


@pytest.mark.parametrize("window", [5, 64, 200])
@pytest.mark.parametrize("per_position", [1, 3])
def test_long_chunks_with_a_cache_equal_the_whole_and_the_cache_stays_bounded(window: int, per_position: int) -> None:
    layer, cache = some_layer().requires_grad_(False), StackCache(1)
    position_T = torch.arange(400).repeat_interleave(per_position)
    x_BTD = torch.randn(1, len(position_T), 32, generator=torch.Generator().manual_seed(3))

    def through(states: torch.Tensor, positions: torch.Tensor, kept: StackCache | None) -> torch.Tensor:
        view = View(
            positions, HEAD_DIM, 100.0, cache=kept, window=window, square=per_position == 1, per_position=per_position
        )
        return layer(states, view, view.layer_cache(0))

    pieces, start = [], 0
    for groups in (290, 1, 5, 104):
        chunk = slice(start * per_position, (start + groups) * per_position)
        pieces.append(through(x_BTD[:, chunk], position_T[chunk], cache))
        start += groups
        kept = cache.layers[0].k_BKSE
        assert kept is not None and kept.shape[2] == min(start, window - 1) * per_position
        assert kept.untyped_storage().nbytes() <= 4 * KEY_HEADS * HEAD_DIM * max(kept.shape[2], groups * per_position)
    torch.testing.assert_close(torch.cat(pieces, 1), through(x_BTD, position_T, None), atol=5e-5, rtol=1e-4)
