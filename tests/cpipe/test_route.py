import json

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
