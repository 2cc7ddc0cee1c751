import re
import tomllib

import pytest

from cpipe.pipeline import BY_COMMAND, STAGES, TABLES
from cpipe.settings import leaves, read_settings, resolve
from cpipe.template import settings_template
from schemas.generate_text import GenerateConfig

CONFIGS = {command: stage.config for command, stage in BY_COMMAND.items()} | {"generate": GenerateConfig}
# A table [import] would stand for a seed that is imported, and what is exported is named where it is.
SHOWN = (*(stage.command for stage in STAGES), "generate")


def uncommented() -> str:
    return re.sub(r"^#(?! )", "", settings_template(), flags=re.MULTILINE)


@pytest.mark.parametrize("text", [settings_template(), uncommented()], ids=["as written", "without comments"])
def test_it_says_what_the_defaults_say(text: str) -> None:
    tables = tomllib.loads(text)
    assert tuple(tables) == SHOWN
    for command, table in tables.items():
        assert resolve(CONFIGS[command], table, {}, "template") == resolve(CONFIGS[command], {}, {}, "defaults")


@pytest.mark.parametrize("command", SHOWN)
def test_every_setting_stands_in_its_table_with_its_sentence(command: str) -> None:
    tables = tomllib.loads(uncommented())
    text = settings_template().split(f"\n[{command}]\n")[1].split("\n[")[0]
    told = " ".join(text.replace("\n#   ", " ").split())
    for leaf in leaves(CONFIGS[command]):
        assert str(leaf.field.description) in told, leaf.name
        assert leaf.name in tables[command] or f"\n# {leaf.name}: not set (" in text
    assert len(tables[command]) + text.count(": not set (") == len(list(leaves(CONFIGS[command])))


def test_choices_stand_beside_their_setting() -> None:
    assert '#method = "balanced"  # of balanced, unbalanced, random\n' in settings_template()
    assert (
        '#targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]\n'
        in settings_template()
    )
    assert (
        '#modes = ["independent", "joint", "contrastive"]  '
        "# of independent, joint, contrastive, mean-activation, arrow\n" in (settings_template())
    )
    assert "# tree: not set (a text)\n# " not in settings_template()


def test_lines_are_short_enough_to_read() -> None:
    assert max(map(len, settings_template().splitlines())) <= 120


def test_init_makes_the_run_and_its_settings_and_never_replaces_them(cpipe, tmp_path, line) -> None:
    run_dir = tmp_path / "new" / "run"
    result = cpipe("init", run_dir)
    assert result.exit_code == 0 and result.stdout == f"{run_dir}/cpipe.toml\n"
    assert [path.name for path in run_dir.iterdir()] == ["cpipe.toml"]
    assert read_settings(run_dir, None, TABLES).keys() == set(SHOWN)
    (run_dir / "cpipe.toml").write_text("[cluster]\nclusters = 3\n")
    result = cpipe("init", run_dir)
    assert result.exit_code == 2 and f"{run_dir}/cpipe.toml is there already" in line(result)
    assert (run_dir / "cpipe.toml").read_text() == "[cluster]\nclusters = 3\n"


def test_init_writes_through_no_link(cpipe, tmp_path, line) -> None:
    (tmp_path / "cpipe.toml").symlink_to(tmp_path / "elsewhere")
    result = cpipe("init", tmp_path)
    assert result.exit_code == 2 and "is there already" in line(result)
    assert not (tmp_path / "elsewhere").exists()
