import subprocess
import sys
import tomllib

import pytest

from cpipe.demo import PROMPT, SAMPLED, SETTINGS, write_settings
from cpipe.pipeline import BY_COMMAND, TABLES
from cpipe.settings import read_settings, resolve
from schemas.compose_model import ComposeConfig
from schemas.generate_text import GenerateConfig

TABLES_OF_THE_DEMO = tomllib.loads(SETTINGS)


@pytest.mark.parametrize("command", TABLES_OF_THE_DEMO)
def test_every_setting_is_known_to_its_stage(command):
    table = TABLES_OF_THE_DEMO[command]
    config = resolve(BY_COMMAND[command].config, table, {}, "demo")
    flat = str(config.model_dump())
    for name, value in table.items():
        assert f"'{name}': {value!r}" in flat


def test_the_stages_fit_each_other():
    clusters = TABLES_OF_THE_DEMO["cluster"]["clusters"]
    lengths = {table["sequence_length"] for table in TABLES_OF_THE_DEMO.values() if "sequence_length" in table}
    assert TABLES_OF_THE_DEMO["train-experts"]["batch_size"] % clusters == 0
    assert len(lengths) == 1
    assert lengths.pop() % resolve(ComposeConfig, TABLES_OF_THE_DEMO["compose"], {}, "demo").central.group_length == 0


def test_samples_can_be_asked_for():
    for model in SAMPLED:
        assert GenerateConfig(prompt=PROMPT, model=model).model == model


def test_settings_are_written_once_and_then_the_users_own(tmp_path):
    write_settings(tmp_path)
    assert read_settings(tmp_path, None, TABLES) == {name: [table] for name, table in TABLES_OF_THE_DEMO.items()}
    (tmp_path / "cpipe.toml").write_text("[cluster]\nclusters = 2\n")
    write_settings(tmp_path)
    assert read_settings(tmp_path, None, TABLES) == {"cluster": [{"clusters": 2}]}


@pytest.mark.slow
def test_the_demo_ends_with_a_table_a_plot_samples_and_a_report(tmp_path):
    command = [sys.executable, "-m", "cpipe", "demo", str(tmp_path / "demo")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    reports = tmp_path / "demo/reports"
    assert (reports / "bits_per_byte.png").read_bytes().startswith(b"\x89PNG")
    table = (reports / "table.md").read_text()
    for model in ("dense", "composed stitch", "cBTM all", "central alone"):
        assert f"| {model} |" in table and model in result.stdout
    assert result.stdout.count(PROMPT) == len(SAMPLED)
    assert PROMPT in (reports / "report.html").read_text() and str(reports / "report.html") in result.stdout
    assert "Traceback" not in result.stderr
