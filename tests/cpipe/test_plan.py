import json

import pytest

from cpipe.settings import plan_settings
from cpipe.show import show_plan
from schemas.plan_training import Plan


def test_a_plan_for_scripts_follows_the_settings_file_and_a_table_is_for_people(cpipe, piped_run, tmp_path, capsys):
    before, _, calm = (piped_run / "cpipe.toml").read_text().split("[[compose]]")
    fewer = before.replace("[train-gates]", "[train-gates]\nmodes = ['independent']")
    (tmp_path / "fewer.toml").write_text(f"{fewer}[[compose]]{calm}")
    words = ("--settings", tmp_path / "fewer.toml", "--flops-per-second", "1e9")
    result = cpipe("plan", piped_run, *words, "--json")
    assert result.exit_code == 0
    plan = Plan.from_json(result.stdout)
    first, second = plan.trainings[:2]
    assert (first.name, first.tokens, plan.measured) == ("seed", 3 * 6 * 32, False)
    assert second.count == 3 and plan.unknown == ()
    show_plan(plan, as_json=False)
    table = capsys.readouterr().out
    assert all(each.name in table for each in plan.trainings)
    assert "1e+09 FLOP/s a device, as given" in table


def test_a_plan_needs_no_more_than_a_folder_and_settings(cpipe, tmp_path):
    (tmp_path / "cpipe.toml").write_text(
        "[cluster]\nclusters = 2\n[train-seed]\nhidden_size = 32\nnum_hidden_layers = 1\nsteps = 5\n"
        "[train-gates]\nmodes = ['independent']\n[[compose]]\nencoder_layers = 1\nlatent_layers = 1\n"
        "decoder_layers = 1\n"
    )
    result = cpipe("plan", tmp_path, "--flops-per-second", "1e9")
    assert result.exit_code == 0
    assert "unknown: epochs: no tokens" in result.stdout
    assert "the seed sees 0.12 tokens for each weight" in " ".join(result.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["cpipe.toml"]


def test_what_cannot_be_planned_is_one_line(cpipe, line, tmp_path):
    (tmp_path / "cpipe.toml").write_text("[train-seed]\nsteps = 0\n")
    result = cpipe("plan", tmp_path)
    assert result.exit_code == 2 and "`training.steps`" in line(result)
    result = cpipe("plan", tmp_path / "none")
    assert result.exit_code == 2 and "no run at" in line(result)


def test_prompts_of_a_file_are_printed_in_order(cpipe, line, piped_run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("whisk the\n\ndef self\n")
    words = ("generate", piped_run, "--model", "seed", "--prompts", path, "--max-tokens", "5")
    found = [json.loads(each) for each in cpipe(*words, "--json").stdout.splitlines()]
    assert [each["prompt"] for each in found] == ["whisk the", "def self"]
    assert cpipe(*words).stdout == "".join(f"{each['prompt']}{each['text']}\n\n" for each in found)
    result = cpipe("generate", piped_run, "--prompts", tmp_path / "none.txt")
    assert result.exit_code == 3 and "cannot read prompts" in line(result)
    result = cpipe(*words, "--prompt", "a")
    assert result.exit_code == 2 and "leave one of them" in line(result)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ("", False),
        ("[train-seed]", False),
        ("[import]", True),
        ('[import]\nsource = "hf:there"', "hf:there"),
    ],
)
def test_the_settings_say_whether_the_seed_is_imported(tables, expected, tmp_path):
    (tmp_path / "cpipe.toml").write_text(tables)
    assert plan_settings(tmp_path, None, {}).imported == expected
