import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from schemas.evaluate_models import EvaluateManifest
from schemas.failures import IntegrityFailure, UsageFailure
from schemas.report_run import ReportConfig
from schemas.verify_run import VerifyConfig
from stages import evaluate_models, report_run, verify_run

HOSTILE = (
    "</title></table><script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;{{ 7*7 }}{% endraw %}]]>\u2028\x01"
)
VOID = {"meta", "img", "br"}  # of HTML; in SVG an element that is empty says so


class Page(HTMLParser):
    """What a browser would make of the page: elements in order, with their attributes; the text."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] != "style" else ""


def reported(run_dir: Path) -> Page:
    (ref,) = report_run.stream(ReportConfig(), run_dir)
    assert ref.path == "reports/report.html"
    page = Page(ref.check(run_dir))
    assert page.open == []
    return page


def edit(path: Path, *keys: Any, value: Any) -> None:
    content = json.loads(path.read_bytes())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def page(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return reported(Path(shutil.copytree(evaluated_run, tmp_path_factory.mktemp("report") / "my run")))


def test_it_asks_for_nothing_from_outside_and_runs_nothing(page: Page) -> None:
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "use",
    }
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "xlink:href", "action")]
        assert (attributes.get("href") or "#")[0] == "#", attributes
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,"), tag
    addresses = re.findall(r"url\(([^)]*)\)", page.source)
    assert set(addresses) == {"#tip"} and "@import" not in page.source
    assert not re.search(r"https?://|//[a-z]", re.sub(r"base64,[^\"]*", "", page.source))
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_every_link_leads_somewhere_on_the_page(page: Page) -> None:
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert len(links) > 6 and {str(link)[1:] for link in links} <= set(names)


def test_it_tells_what_the_manifests_tell(page: Page, evaluated_run: Path) -> None:
    assert page.text.lstrip().startswith("my run")
    for path in evaluated_run.rglob("manifest.json"):
        folder, content = path.parent.relative_to(evaluated_run).as_posix(), json.loads(path.read_bytes())
        assert folder in page.text
        for ref in content["outputs"]:
            assert ref["path"] in page.text and ref["digest"] in page.text
        for name in content["config"]:
            assert name in page.text
    for row in EvaluateManifest.read(evaluated_run).metrics.rows:
        assert row.model in page.text and f"{row.bits_per_byte:.4f}" in page.text
        assert all(f"{value:.3f}" in page.text for value in row.sources.values())
    clusters = json.loads((evaluated_run / "clusters/manifest.json").read_bytes())["metrics"]
    assert f"{clusters['valid_token_balance']:.3f} of held-out tokens" in page.text
    for cluster in clusters["clusters"]:
        assert ", ".join(cluster["top_terms"]) in page.text and f"{cluster['tokens']:,}" in page.text


def test_it_draws_every_training_and_every_folder(page: Page) -> None:
    figures = page.source.split("<figure>")[1:]
    curves = {figure.split("</figcaption>")[0].split(">")[-1]: figure.count("<polyline") for figure in figures}
    assert curves == {"train-seed": 1, "train-experts": 4, "train-gates": 5, "compose-alone": 1, "compose": 3}
    boxes = re.findall(r"<rect[^>]*/><text[^>]*>([^<]*)<", page.source)
    expected = {"tokens", "clusters", "seed", "experts", "dense", "gates", "central-alone", "central", "reports"}
    assert expected <= set(boxes) and len(boxes) == len(set(boxes)) == 11
    assert page.source.count('<img src="data:image/png') == 2
    assert 'alt="Mean weight of the seed and of each expert on the text of each source' in page.source


def test_settings_that_are_not_the_default_stand_out(page: Page) -> None:
    assert re.search(r'<tr class="changed"><td class="mono">clusters</td><td class="mono text">3</td>', page.source)
    assert re.search(r'<tr><td class="mono">restarts</td><td class="mono text">3</td>', page.source)
    assert "Bold: not the default" in page.text


def test_nothing_of_the_run_becomes_markup(page: Page, evaluated_run: Path, tmp_path: Path) -> None:
    hostile_name = HOSTILE.replace("/", "∕") + "\udcff"  # a byte that is no UTF-8
    run_dir = Path(shutil.copytree(evaluated_run, tmp_path / hostile_name))
    clusters, reports, tokens = (run_dir / folder / "manifest.json" for folder in ("clusters", "reports", "tokens"))
    for key in ("top_terms", "central_documents"):
        edit(clusters, "metrics", "clusters", 0, key, value=[HOSTILE])
    edit(clusters, "metrics", "clusters", 0, "sources", value={HOSTILE: 3})
    edit(clusters, "config", "vectors", value=HOSTILE)
    edit(tokens, "config", "inputs", value=[HOSTILE])
    edit(tokens, "config", "text_column", value=HOSTILE)
    edit(tokens, "inputs", 0, "name", value=HOSTILE)
    edit(tokens, "environment", "machine", value=HOSTILE)
    edit(tokens, "environment", "started", value=HOSTILE)
    edit(tokens, "environment", "versions", value={HOSTILE: HOSTILE})
    rows = json.loads(reports.read_bytes())["metrics"]["rows"]
    for key in ("model", "group"):
        edit(reports, "metrics", "rows", 0, key, value=HOSTILE)
    for number, row in enumerate(rows):
        edit(reports, "metrics", "rows", number, "sources", value={HOSTILE: 1.0} | row["sources"])
    edit(reports, "metrics", "usage", 0, "part", value=HOSTILE)
    shutil.copytree(run_dir / "central", run_dir / f"central-{hostile_name}")
    sample = {"model": HOSTILE, "prompt": HOSTILE, "text": HOSTILE}
    (run_dir / "reports/samples.json").write_text(json.dumps({"samples": [sample]}))
    line = {"step": 3, "prompt": HOSTILE, "text": HOSTILE}
    (run_dir / "seed/samples.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n")
    attacked = reported(run_dir)
    known = {(tag, name) for tag, attributes in page.elements for name in ("", *attributes)}
    found = {(tag, name) for tag, attributes in attacked.elements for name in ("", *attributes)}
    assert found - known <= {("pre", ""), ("div", ""), ("ul", ""), ("li", "")}  # samples, and what is stale
    assert "alert" not in str([attributes for tag, attributes in attacked.elements if tag not in ("svg",)])
    shown = HOSTILE.replace("\ud800", "?")
    assert (
        attacked.text.count(shown) > 12
        and "{{ 7*7 }}" in attacked.text
        and "49" not in attacked.text.split("Pipeline")[0]
    )


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(evaluated_run: Path, tmp_path: Path) -> None:
    first, second = (Path(shutil.copytree(evaluated_run, tmp_path / place / "run")) for place in ("a", "b"))
    assert reported(first).source == reported(second).source == reported(first).source


def test_it_harms_neither_the_evaluation_nor_the_check_of_the_run(
    evaluated_run: Path, copied_run: Any, evaluation: Any
) -> None:
    run_dir = copied_run(evaluated_run)
    before = (run_dir / "reports/manifest.json").read_bytes()
    (run_dir / "reports/samples.json").write_text('{"samples": []}')
    reported(run_dir)
    assert sum(len(each.problems) for each in verify_run.stream(VerifyConfig(), run_dir)) == 0
    evaluate_models.run(evaluation, run_dir)  # up to date: nothing is scored again
    assert (run_dir / "reports/manifest.json").read_bytes() == before
    assert (run_dir / "reports/report.html").is_file()


@pytest.mark.parametrize("run", ["clustered_run", "seeded_run", "expert_run", "full_run"])
def test_a_run_that_is_not_finished_has_one_too(run: str, request: Any, copied_run: Any) -> None:
    run_dir = copied_run(request.getfixturevalue(run))
    page = reported(run_dir)
    assert "tokens of text" in page.text and "Models" not in page.text
    assert ("Training" in page.text) == (run != "clustered_run")
    links = {str(attributes["href"])[1:] for tag, attributes in page.elements if tag == "a"}
    assert links <= {attributes.get("id") for _, attributes in page.elements}


def test_of_a_run_not_begun_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageFailure, match=r"nothing in .* is finished yet"):
        reported(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_belong_together_is_said(evaluated_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(evaluated_run)
    assert "belongs together" not in reported(run_dir).text
    edit(run_dir / "seed/manifest.json", "metrics", "parameters", value=1)
    assert "dense was made from another seed than is there now" in reported(run_dir).text


def test_the_last_samples_of_every_training_are_shown(expert_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(expert_run)
    assert "Samples" not in reported(run_dir).text
    lines = [{"step": step, "prompt": "the ", "text": f"text of step {step}\u2028end"} for step in range(1, 2001)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    for folder in ("seed", "experts/001", "dense", ".seed.replaced"):
        (run_dir / folder).mkdir(exist_ok=True)
        (run_dir / folder / "samples.jsonl").write_text(f'{text}{{"step": 2001, "pro', encoding="utf-8")
    page = reported(run_dir)
    titles = re.findall(r"<h3>([^<]*), while it was trained</h3>", page.source)
    assert titles == ["seed", "dense", "experts/001"]
    assert re.findall(r"text of step (\d+)", page.text) == ["1998", "1999", "2000"] * 3
    assert "step 2,000" in page.text


@pytest.mark.parametrize("content", ["\n", "[]\n", '{"step": 1, "prompt": "a"}\n', "[" * 70_000 + "\n\n"])
def test_training_samples_that_are_none_are_refused_in_one_line(
    content: str, seeded_run: Path, copied_run: Any
) -> None:
    run_dir = copied_run(seeded_run)
    (run_dir / "seed/samples.jsonl").write_text(content)
    with pytest.raises(IntegrityFailure, match=r"^[^\n]*samples\.jsonl holds no samples of a training: remove it$"):
        reported(run_dir)


@pytest.mark.parametrize("content", ["", "[]", '{"samples": [{"model": "a"}]}', '{"samples": 3}', "[" * 100_000])
def test_samples_that_are_none_are_refused_in_one_line(content: str, clustered_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(clustered_run)
    (run_dir / "reports").mkdir()
    (run_dir / "reports/samples.json").write_text(content)
    with pytest.raises(IntegrityFailure, match=r"^[^\n]*samples\.json holds no samples: remove it[^\n]*$"):
        reported(run_dir)


def test_a_map_that_was_changed_is_not_shown(clustered_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(clustered_run)
    with (run_dir / "clusters/map.png").open("r+b") as file:
        file.write(b"<svg")
    with pytest.raises(IntegrityFailure, match=r"map\.png was changed"):
        reported(run_dir)
    assert not (run_dir / "reports/report.html").exists()


@pytest.mark.parametrize("number", [10**300, 10**1000, -(10**400)], ids=["large", "larger", "negative"])
def test_absurd_numbers_are_shown_or_refused(number: int, evaluated_run: Path, copied_run: Any) -> None:
    run_dir = copied_run(evaluated_run)
    for folder in ("seed", "dense"):
        edit(run_dir / folder / "manifest.json", "metrics", "parameters", value=number)
        edit(run_dir / folder / "manifest.json", "metrics", "training", "steps", value=number)
    edit(run_dir / "reports/manifest.json", "metrics", "rows", 0, "parameters", value=number)
    if number > 0:
        edit(run_dir / "tokens/manifest.json", "outputs", 0, "size", value=number)
        edit(run_dir / "tokens/manifest.json", "environment", "peak_memory", value=number)
    edit(run_dir / "seed/manifest.json", "metrics", "training", "curve", value=[1e308, -1e308])
    edit(run_dir / "reports/manifest.json", "metrics", "rows", 0, "bits_per_byte", value=1e308)
    reported(run_dir)
