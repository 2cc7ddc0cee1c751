"""What came to a run with experts added later: the text of their domains, and the centroids that route to them.

- an added expert says by its name which domain it has seen; a domain whose expert is not finished is no part of the run
"""

from pathlib import Path

from schemas.failures import UsageFailure
from schemas.manifest import FILE_NAME
from schemas.tokenize_text import Split, TokenizeManifest
from schemas.train_experts import AddedManifest, ExpertManifest, ExpertsManifest


def added_folder(name: str) -> str:
    """Folder of an added domain in the run."""
    return f"{AddedManifest.folder}/{name}"


def begun_domains(run_dir: Path) -> list[AddedManifest]:
    """The domains whose text is there, by the numbers of their experts, which may be missing."""
    found = [AddedManifest.parse(path) for path in run_dir.glob(f"{AddedManifest.folder}/*/{FILE_NAME}")]
    return sorted(found, key=lambda domain: (domain.config.expert, domain.config.name))


def added_domains(run_dir: Path) -> list[AddedManifest]:
    """The domains of the run's finished experts, by their numbers. Raises UsageFailure when there are no experts."""
    folders = [ref.name for ref in ExpertsManifest.read(run_dir).inputs if ref.name != "dense"]
    return [domain for folder in folders if (domain := domain_of(run_dir, folder))]


def domain_of(run_dir: Path, folder: str) -> AddedManifest | None:
    """What the expert in `folder` was added for; None for a cluster's. Raises UsageFailure when that was replaced."""
    expert = ExpertManifest.read(run_dir, folder)
    if expert.config.added is None:
        return None
    name = added_folder(expert.config.added)
    domain = AddedManifest.read(run_dir, name)
    if domain.as_input(name) not in expert.inputs:
        raise UsageFailure(
            f"{run_dir / folder} was made from another {name} than is there now: "
            f"run `cpipe {domain.command} {run_dir} --expert {domain.config.expert} --force`"
        )
    return domain


def text_of_all(run_dir: Path, tokens: TokenizeManifest, split: Split) -> list[Path]:
    """The token shards of a split, checked: those of the run, after them those of added domains."""
    added = [ref for domain in added_domains(run_dir) for ref in domain.shards(split)]
    return [ref.check(run_dir) for ref in (*tokens.shards(split), *added)]


def added_labels(run_dir: Path, split: Split) -> list[int]:
    """The expert's number for each document that `text_of_all` has after those of the run."""
    shards = ((domain.config.expert, ref) for domain in added_domains(run_dir) for ref in domain.shards(split))
    return [expert for expert, ref in shards for _ in range(ref.rows or 0)]
