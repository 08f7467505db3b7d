"""The report: complete, self-contained, and safe whatever the model wrote."""

from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from r1mega.records import Group
from r1mega.run.closing import closing_table
from r1mega.run.directory import RunDirectory
from r1mega.run.metrics import MetricsWriter
from r1mega.run.report import write_report
from r1mega.run.samples import write_samples

MakeGroup = Callable[[str, list[str]], Group]
HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></body><svg/onload=alert(1)><script src=//evil.example></script>",
    """"'><img src=x onerror=alert(1)><think onclick=alert(1)>3</think> &lt;answer&gt;7</answer>""",
    "half a character: \ud800",
]
# What the page itself and matplotlib's drawings are made of.
PAGE = (
    "html head meta title style body h1 h2 h3 p div span b i s pre details summary table tr th td"
)
DRAWING = "svg g path defs use text clippath rect tspan"


class Elements(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def trained(run: RunDirectory, group: MakeGroup) -> RunDirectory:
    writer = MetricsWriter(run)
    writer.write(0, {"eval/pass@1": 0.125})
    for step in range(1, 16):
        values = {"reward/accuracy": step / 16, "response/length_mean": 10.0 * step}
        writer.write(step, {**values, "time/rollout_s": 2.0, "<b>odd</b>": 1.0})
        write_samples(run, step, [group("p/0", HOSTILE)], rows=len(HOSTILE))
    writer.write(16, {"eval/pass@1": 0.875})
    writer.close()
    run.config_path.write_text("name: test\nmodel:\n  init: <script>alert(2)</script>\n")
    return run


def test_model_text_is_shown_and_inert(trained: RunDirectory) -> None:
    page = write_report(trained).read_text()
    elements = Elements(page)
    assert elements.tags - {*PAGE.split(), *DRAWING.split()} == set()
    assert [name for name, _ in elements.attributes if name.startswith("on")] == []
    for text in HOSTILE:  # word for word, but for what UTF-8 cannot hold
        assert text.replace("\ud800", "?") in elements.text
    assert "init: <script>alert(2)</script>" in elements.text
    assert "default-src 'none'; style-src 'unsafe-inline'" in page


def test_the_page_needs_nothing_else(trained: RunDirectory) -> None:
    elements = Elements(write_report(trained).read_text())
    links = [value for name, value in elements.attributes if name in ("src", "href", "xlink:href")]
    assert [link for link in links if not (link or "").startswith("#")] == []


def test_the_page_holds_the_numbers(trained: RunDirectory) -> None:
    text = Elements(write_report(trained).read_text()).text
    for part in ("0.125 \u2192 0.875", "20 \u2192 140", "Where the time goes", "16 steps in"):
        assert part in text
    for absent in ("Entropy", "KL to the reference", "Sampler against learner"):
        assert absent not in text


def test_a_run_without_samples_and_config_has_a_report(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="no metrics yet"):
        write_report(run)
    writer = MetricsWriter(run)
    writer.write(1, {"loss": float("nan")})
    writer.close()
    text = Elements(write_report(run).read_text()).text
    assert "Responses" not in text
    assert "Configuration" not in text


def test_closing_table(trained: RunDirectory) -> None:
    write_report(trained)
    table = closing_table(trained)
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["accuracy", "response length (tokens)", "held-out pass@1"],
        ["0.125", "20", "0.125"],
        ["0.875", "140", "0.875"],
        ["+0.750", "+120", "+0.750"],
    ]
    assert str(table.caption).startswith("step 16 after ")
    assert str(table.caption).endswith(f"report: {trained.report}")


def test_closing_table_of_nothing(run: RunDirectory) -> None:
    assert "no metrics in" in str(closing_table(run).caption)
