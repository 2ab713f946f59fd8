"""``bench report``: pages from results of the real commands, from old results, and from damaged ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from moesaic import cli
from moesaic.bench import provenance, report
from moesaic.bench.report import records, sections
from moesaic.errors import InvalidParameter, InvalidRequest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
OLD = [
    RESULTS / f"{name}.json"
    for name in ("offline-8x7b-q2", "aime-short", "aime-context", "client_500", "quantization", "peers", "kernels")
]
HOSTILE = "<img src=x onerror=alert(1)> | `a` *b*\n# c"


class Cells(HTMLParser):
    """Collects the cells of all tables, row by row, and the attributes that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("href", "src", "style", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.rows[-1][-1] += data


def offline(tmp_path: Path, **changes: Any) -> Path:
    """Write a result of ``bench offline`` with two lengths and two batches, as offline.run returns it."""
    settings = [
        {
            "work": {"prompt": prompt, "tokens": 8, "batch": batch},
            "speed": {"first_token_seconds": prompt / 4096, "prefill_tokens_s": 500.0, "decode_tokens_s": 10.0 * batch},
            "read_share": 0.25 * batch,
            "prompt_share": 0.125,
        }
        for prompt in (8192, 32768)
        for batch in (1, 2)
    ]
    model = {"name": "mixtral", "format": "q4", "weights": {"int4": 7}}
    figures = {"model": model | changes, "memory": {"peak": 3_000_000_000}, "limits": None, "settings": settings}
    path = tmp_path / "offline.json"
    provenance.write(path, provenance.record("moesaic bench offline", figures))
    return path


def quality(tmp_path: Path, model: str = "mixtral") -> Path:
    row = {"bits_per_weight": 4.5, "perplexity": 6.125, "perplexity_standard_error": 0.25}
    distance = {"mean": {"value": 0.0125, "standard_error": 0.001}}
    rows = [row | {"format": form, "kl_divergence": distance} for form in ("q4", "q2")]
    path = tmp_path / "quality.json"
    provenance.write(path, provenance.record("moesaic perplexity", {"model": model, "formats": rows}))
    return path


def table(page: str, first: str) -> list[list[str]]:
    """Return the rows whose first cell is ``first``."""
    return [row for row in Cells(page).rows if row[0] == first]


def test_old_results_become_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.html"
    assert cli.main(["bench", "report", *map(str, OLD), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and list(out.parent.iterdir()) == [out]
    page = out.read_text()
    cells = Cells(page)
    assert ["built-in", "concurrency 16", "514", "1102", "71.4", "0.121", "0", "3"] in cells.rows
    assert "55%" in table(page, "mixtral-8x7b")[0] and "10.8" in table(page, "mixtral-8x7b")[0]
    assert any(row[0] == "Moesaic, whole LLM, q4" and "109 (62%)" in row for row in cells.rows)
    origins = cells.rows[-len(OLD) :]
    assert [row[1] for row in origins] == [path.name for path in OLD]
    for row, path in zip(origins, OLD, strict=True):
        record = json.loads(path.read_text())
        assert row[3:6] == [record["date"], record["commit"], record["command"]]
        assert record["machine"]["cpu"] in row[6] and f"torch {record['versions']['torch']}" in row[7]


def test_page_is_self_contained_and_runs_nothing(tmp_path: Path) -> None:
    report.write(OLD, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    cells = Cells(page)
    assert cells.links == [] and not {"script", "link", "img", "iframe", "object"} & set(cells.tags)
    assert "url(" not in page and "@import" not in page and cells.tags.count("svg") > 8


def test_markdown_has_its_pictures_beside_it(tmp_path: Path) -> None:
    written = report.write(OLD, tmp_path / "all results.md")
    text = written[-1].read_text()
    names = re.findall(r"^!\[.*\]\(<(.*)>\)$", text, re.MULTILINE)
    assert len(names) > 8 and sorted(tmp_path / name for name in names) == sorted(written[:-1])
    for path in written[:-1]:
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "prefers-color-scheme" in path.read_text()
    assert "| built-in | concurrency 16 | 514 | 1102 | 71.4 | 0.121 | 0 | 3 |" in text


def test_long_contexts_are_compared_with_short_ones(tmp_path: Path) -> None:
    page = sections.page([records.read(offline(tmp_path))])
    [section] = [each for each in page.sections if each.title == "Short and long contexts"]
    [chart] = section.charts
    assert chart.series == ("8k prompt", "32k prompt") and [each.labels for each in chart.groups] == [
        ("batch 1",),
        ("batch 2",),
    ]
    assert [row[2:4] for row in section.tables[0].rows] == [
        ["8192", "10.0"],
        ["32768", "10.0"],
        ["8192", "20.0"],
        ["32768", "20.0"],
    ]


def test_contexts_of_different_machines_are_not_compared(tmp_path: Path) -> None:
    found = [json.loads(path.read_text()) for path in OLD[1:3]]
    found[1]["machine"]["cpu"] = "another"
    for index, record in enumerate(found):
        (tmp_path / f"{index}.json").write_text(json.dumps(record))
    page = sections.page([records.read(path) for path in sorted(tmp_path.glob("*.json"))])
    assert "Short and long contexts" not in [each.title for each in page.sections]


def test_throughput_has_the_batch_below_and_the_share_above(tmp_path: Path) -> None:
    page = sections.page([records.read(offline(tmp_path))])
    [chart] = page.sections[0].charts
    assert chart.title == "mixtral, q4" and [each.labels for each in chart.groups][1] == ("batch 2", "8k prompt")
    assert [(bar.value, bar.share) for bar in chart.groups[1].bars] == [(20.0, 0.5), (10.0, None)]
    row = page.sections[0].tables[0].rows[1]
    assert row == ["mixtral", "q4", "8192", "2", "20.0", "50%", "10.0", "2", "500", "12%", "3.00", "1"]


def test_quality_stands_beside_the_speed_of_the_same_format(tmp_path: Path) -> None:
    page = sections.page([records.read(offline(tmp_path)), records.read(quality(tmp_path))])
    [section] = [each for each in page.sections if each.title == "Quality and speed of formats"]
    assert section.tables[0].rows == [
        ["mixtral", "q4", "4.50", "6.12 ± 0.25", "0.0125 ± 0.0010", "10.0", "25%", "2"],
        ["mixtral", "q2", "4.50", "6.12 ± 0.25", "0.0125 ± 0.0010", "-", "-", "2"],
    ]
    assert section.charts[0].groups[0].labels == ("q4", "perplexity 6.12")
    other = sections.page([records.read(offline(tmp_path)), records.read(quality(tmp_path, "another"))])
    assert [row[5] for each in other.sections for row in each.tables[0].rows if row[0] == "another"] == ["-", "-"]


def test_results_without_origin_are_read(tmp_path: Path) -> None:
    rows = json.loads(quality(tmp_path).read_text())["figures"]["formats"]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    (tmp_path / "one.json").write_text(json.dumps(rows[0]))
    many, one = (records.read(tmp_path / name) for name in ("many.json", "one.json"))
    assert len(many.quality) == 2 and len(one.quality) == 1 and one.origin["command"] == "not recorded"


def test_tasks_of_lm_eval_become_a_table(tmp_path: Path) -> None:
    rows = [
        {"format": form, "results": {"arc": {"alias": "arc", "acc,none": value, "acc_stderr,none": 0.01}}}
        for form, value in (("q4", 0.5), ("q2", 0.25))
    ]
    provenance.write(tmp_path / "eval.json", provenance.record("moesaic eval", {"model": "m", "formats": rows}))
    page = sections.page([records.read(tmp_path / "eval.json")])
    assert page.sections[0].tables[0].rows == [["arc", "", "acc", "0.5000 ± 0.0100", "0.2500 ± 0.0100"]]


def test_names_in_results_are_only_text(tmp_path: Path) -> None:
    path = offline(tmp_path, name=HOSTILE)
    report.write([path], tmp_path / "report.html")
    written = report.write([path], tmp_path / "report.md")
    cells = Cells((tmp_path / "report.html").read_text())
    assert "img" not in cells.tags and any(row[0] == HOSTILE for row in cells.rows)
    for picture in written[:-1]:
        assert "<img" not in picture.read_text() and ElementTree.fromstring(picture.read_text()) is not None
    text = written[-1].read_text()
    assert not re.search(r"(?<!\\)<img|^# c", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows[:5]}) == 1


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text(path.read_text()[:-20]), "is no JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe{"), "is no JSON"),
        (lambda path: path.write_text("[" * 100_000), "is no JSON"),
        (lambda path: path.write_text("3"), "is not a result of bench startup, bench offline"),
        (lambda path: path.write_text('{"figures": []}'), "is not a result of"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (damage(lambda record: record["figures"]["settings"][1].pop("speed")), "damaged result of bench offline: KeyE"),
        (damage(lambda record: record["figures"]["settings"][0]["work"].update(batch=0)), "ZeroDivisionError"),
        (damage(lambda record: record["figures"].update(settings=5)), "TypeError"),
        (damage(lambda record: record["figures"]["model"].pop("name")), "damaged"),
        (damage(lambda record: record.update(machine={"cpu": 1})), "KeyError: 'cores'"),
        (damage(lambda record: record.update(versions=[1])), "AttributeError"),
        (damage(lambda record: record["figures"]["settings"][0].update(read_share=float("nan"))), "no finite number"),
        (damage(lambda record: record["figures"]["settings"][0].update(read_share="1")), "no finite number"),
    ],
)
def test_damaged_result_is_named_and_nothing_is_written(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    good, bad, out = quality(tmp_path), offline(tmp_path), tmp_path / "report.html"
    spoil(bad)
    out.write_text("the page before")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidRequest, match=f"^{re.escape(str(bad))}: .*{words}"):
        report.write([good, bad], out)
    assert sorted(tmp_path.iterdir()) == before and out.read_text() == "the page before"


def test_page_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=r"^out: .*page.pdf ends in neither .html nor .md"):
        report.write([quality(tmp_path)], tmp_path / "page.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot be written"):
        report.write([quality(tmp_path)], tmp_path / "file" / "page.html")
    (tmp_path / "page.md").mkdir()
    with pytest.raises(InvalidRequest, match=r"page\.md.* cannot be written"):
        report.write([quality(tmp_path)], tmp_path / "page.md")
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_can_be_read_in_both_schemes(browser: Browser, tmp_path: Path, scheme: Any) -> None:
    report.write(OLD, tmp_path / "report.html")
    context = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 800})
    page = context.new_page()
    loaded: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    colours = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor,
                  getComputedStyle(document.querySelector("td")).color,
                  getComputedStyle(document.querySelector("svg text")).fill,
                  getComputedStyle(document.querySelector("svg .faint")).fill]"""
    )
    background, *texts = (luminance(colour) for colour in colours)
    for text in texts:  # WCAG 2.2, level AA
        assert (max(text, background) + 0.05) / (min(text, background) + 0.05) >= 4.5
    assert (background > 0.5) == (scheme == "light") and loaded == [page.url] and errors == []
    cut = page.evaluate(
        """() => [...document.querySelectorAll("svg.chart")].filter((chart) => [...chart.querySelectorAll("text")]
            .some((text) => { const box = text.getBBox(), place = text.getCTM(), view = chart.viewBox.baseVal;
              const left = box.x + place.e, right = left + box.width;
              return left < -1 || right > view.width + 1; })).length"""
    )
    assert cut == 0
    context.close()


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour "rgb(r, g, b)", as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
