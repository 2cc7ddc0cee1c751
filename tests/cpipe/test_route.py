import json
import shutil

TEXT = "the cat sat on the mat, naïve 東京 and saw a ship"


def test_the_command_prints_the_text_the_shares_and_the_reasons(cpipe, full_run, line):
    result = cpipe("route", full_run, TEXT, "--why")
    assert result.exit_code == 0, result.stderr
    assert (
        result.stdout.startswith(TEXT) and "% of tokens" in result.stdout and "scores of all experts" in result.stdout
    )
    tokens = json.loads(cpipe("route", full_run, TEXT, "--json", "--threshold", "0.9").stdout)
    assert "".join(token["text"] for token in tokens) == TEXT
    result = cpipe("route", full_run, TEXT, "--top-k", "9")
    assert result.exit_code == 2 and "more than the run's 3 experts" in line(result)


def test_an_added_expert_is_called_by_its_domain(cpipe, full_run, tmp_path, training):
    from schemas.train_experts import ExpertsConfig
    from schemas.train_gates import GatesConfig
    from stages import train_experts, train_gates

    run_dir = shutil.copytree(full_run, tmp_path / "run")
    rows = [{"id": str(number), "text": f"fever dose pulse {number} " * 20} for number in range(12)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ExpertsConfig(training=training, add="medicine", data=(str(tmp_path / "text.jsonl"),))
    train_experts.run(asked, run_dir)
    learnt = training.model_copy(update={"steps": 60, "learning_rate": 0.02, "weight_decay": 0.0})
    train_gates.run(GatesConfig(modes=("contrastive",), training=learnt), run_dir, force=True)
    result = cpipe("route", run_dir, "fever dose pulse fever dose pulse", "--mode", "contrastive")
    assert result.exit_code == 0, result.stderr
    assert "expert 003" in result.stdout and "medicine" in result.stdout
