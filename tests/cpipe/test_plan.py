import json

import pytest

from cpipe.settings import plan_settings


def test_a_plan_for_scripts_follows_the_settings_file_and_a_table_is_for_people(cpipe, piped_run):
    result = cpipe("plan", piped_run, "--flops-per-second", "1e9", "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    first = plan["trainings"][0]
    assert (first["name"], first["tokens"], plan["measured"]) == ("seed", 3 * 6 * 32, False)
    assert plan["trainings"][1]["count"] == 3 and plan["unknown"] == []
    table = cpipe("plan", piped_run, "--flops-per-second", "1e9").stdout
    assert all(each["name"] in table for each in plan["trainings"])
    assert "1e+09 FLOP/s a device, as given" in table


def test_a_plan_needs_no_more_than_a_folder_and_settings(cpipe, tmp_path):
    (tmp_path / "cpipe.toml").write_text("[train-seed]\nhidden_size = 32\nsteps = 5\n[[compose]]\n")
    result = cpipe("plan", tmp_path, "--flops-per-second", "1e9")
    assert result.exit_code == 0
    assert "unknown: epochs: no tokens" in result.stdout
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
