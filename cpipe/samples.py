"""Texts for the report: the same prompts continued by the seed, by the mixed experts and by every composition."""

from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from schemas.compose_model import CentralAloneManifest
from schemas.evaluate_models import EvaluateManifest
from schemas.files import write_bytes
from schemas.generate_text import GenerateConfig
from schemas.manifest import FILE_NAME
from schemas.report_run import SAMPLES, Sample, Samples

TOKENS = 60  # of a continuation, at most


def write_samples(run_dir: Path, prompts: Sequence[str], models: Sequence[str] = ()) -> tuple[Sample, ...]:
    """Write `reports/samples.json`; default: of the seed, the mixed experts and every composition.

    Raises UsageFailure when there are no experts yet.
    """
    from stages.generate_text import stream

    compositions = sorted(path.parent.name for path in run_dir.glob(f"central*/{FILE_NAME}"))
    models = models or ["seed", "cbtm", *(name for name in compositions if name != CentralAloneManifest.folder)]
    samples = []
    for prompt in prompts:
        for model in models:
            logger.info("{} continues {!r:.40}", model, prompt)
            config = GenerateConfig(prompt=prompt, model=model, max_tokens=TOKENS)
            samples.append(Sample(model=model, prompt=prompt, text="".join(stream(config, run_dir))))
    text = Samples(samples=tuple(samples)).model_dump_json(indent=2) + "\n"
    write_bytes(run_dir / EvaluateManifest.folder / SAMPLES, text.encode(), run_dir)
    return tuple(samples)
