"""Tables and figures of the pages are those of the results. python -m pytest tests/test_report.py"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import report


def test_pages_hold_what_the_results_say():
    assert not report.changes(files=False)


@pytest.mark.slow
def test_the_generated_file_holds_what_the_results_say():
    assert not report.changes()


def test_a_changed_figure_is_found_and_mended():
    text = (report.ROOT / "README.md").read_text()
    wrong = text.replace(" GiB | ", "1 GiB | ", 1)
    assert wrong != text
    assert report.filled(wrong) == (text, ["headline"])


@pytest.mark.parametrize(
    "text", ["<!-- results: rounding -->", "<!-- end -->", "<!-- results: rounding --> <!--end-->"]
)
def test_a_marker_without_its_pair_is_refused(text):
    with pytest.raises(ValueError, match="no end"):
        report.filled(text)


def test_words_at_the_start_of_a_line_are_refused():
    with pytest.raises(ValueError, match="noise stands at a line's start"):
        report.filled("a\n  <!-- results: noise --><!-- end -->")


def test_pages_are_short():
    lines = {page: len(page.read_text().splitlines()) for page in report.pages()}
    assert lines.pop(report.ROOT / "README.md") <= 150
    assert max(lines.values()) <= 200


def test_the_readme_names_every_file_of_the_package():
    names = {path.name for path in (report.ROOT / "lowmem").rglob("*.py")} - {"__init__.py"}
    readme = (report.ROOT / "README.md").read_text()
    assert not [name for name in names if f" {name} " not in readme]
