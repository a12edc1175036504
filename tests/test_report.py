"""Tables and figures of the pages are those of the results. python -m pytest tests/test_report.py"""

import sys
from pathlib import Path

import pytest

from lowmem.training.memory import GIB

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import ranks
import report


def test_pages_hold_what_the_results_say():
    assert not report.changes(files=False)


def test_time_in_which_only_communication_runs():
    spans = [
        ("nccl", 0, 10),
        ("product", 5, 8),
        ("nccl", 9, 14),
        ("nccl", 20, 21),
        ("product", 21, 22),
        ("nccl", 21, 22),
    ]
    assert ranks.time_alone(spans, "nccl") == (5 - 0) + (14 - 8) + (21 - 20)
    assert ranks.time_alone(spans, "product") == 0
    assert ranks.duration(spans) == 22
    ms = {"only_communication_ms": 3.0, "profiled_ms_per_step": 12.0, "ms_per_step": 11.0}
    assert ranks.share_of_communication({"gpus": 2} | ms) == 0.25
    assert ranks.share_of_communication({"gpus": 1} | ms) is None
    assert ranks.share_of_communication({"gpus": 2} | ms | {"ms_per_step": 10.0}) is None


def test_what_more_gpus_take_is_reckoned_from_the_weights():
    """A Llama of 70.6 billion weights, 1.05 of them embeddings, which are not moved, and as many its head's."""
    layers, head = 68.452352 * 2e9 / GIB, 128256 * 8192 * 2 / GIB
    assert ranks.moved_gib("70B", 4) == pytest.approx((3 * layers + head) * 3 / 4)
    case = {"case": "70B, four GPUs, batch 8", "gpus": 4, "ledger_gib": {"weights": 32.0}}
    case |= {
        "memory_gib": {"train": {"device": 40.0}, "eval": {"device": 41.0}},
        "kernel_ms": {"communication": 1000.0},
    }
    gib, moved, rate, seconds = ranks.reckon(case, 8)
    assert gib == 41 - 32 + 16
    assert moved == pytest.approx((3 * layers + head) * 7 / 8)
    assert rate == pytest.approx((3 * layers + head) * 3 / 4 * GIB / 1e9)
    assert seconds == pytest.approx((7 / 8) / (3 / 4))


def test_rows_a_second_of_several_gpus_are_compared_with_one_s_of_as_many_rows_a_card():
    def case(name, gpus, batch_size, rows_per_second, commit="a"):
        return {
            "case": name,
            "gpus": gpus,
            "batch_size": batch_size,
            "rows_per_second": rows_per_second,
            "commit": commit,
        }

    ones = [case("8B, one GPU", 1, 8, 60), case("8B, one GPU, batch 16", 1, 16, 80), case("1B, one GPU", 1, 16, 200)]
    cases = [*ones, two := case("8B, two GPUs, batch 32", 2, 32, 120), case("8B, one GPU, batch 16", 1, 16, 90, "b")]
    assert ranks.share_of_linear(two, cases) == 0.75
    assert ranks.share_of_linear(two | {"commit": "c"}, cases) is None
    assert ranks.share_of_linear(two | {"case": "8B, two GPUs, compiled, batch 32"}, cases) is None
    assert ranks.of_one_gpu(two | {"batch_size": 8}, cases, 8) is ones[0]
    assert ranks.of_one_gpu(ones[0], cases, 8) is None


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
