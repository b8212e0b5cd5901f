"""The report page: self-contained, complete, honest about what is missing, and alive in a real browser."""

import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from stagewise.report.content import Content, Curves, Sample, SampleToken
from stagewise.report.page import render, write_page

PREDICTORS = 4  # three experts and their product


def full_content() -> Content:
    steps = range(0, 400, 4)
    loss = {f"expert {k}": [(s, 3.0 - 0.1 * k + 6.0 / (1 + s / 20)) for s in steps] for k in range(3)}
    validation = {
        f"expert {k}": [(s, 1.4 - 0.05 * k + 2.0 / (1 + s / 20)) for s in range(0, 401, 100)] for k in range(3)
    }
    validation["product"] = [(s, 1.28 + 2.0 / (1 + s / 20)) for s in range(0, 401, 100)]
    words = ["def", " read", "(path", "):\n", "    return", " open", "(path", ").", "read", "()", " <b>&amp;"]
    tokens = [
        SampleToken(w, i % 3, [[(w, 0.5), (" a", 0.2), (" b", 0.1), ("\n", 0.05), ('"', 0.01)]] * PREDICTORS)
        for i, w in enumerate(words)
    ]
    return Content(
        title="tiny <model>",
        config={"poe_mode": "flat", "poe_stage_layers": [4, 2, 2], "num_hidden_layers": 8, "hidden_size": 64},
        recipe={"name": "tiny", "seed": 1},
        curves=Curves(loss, validation),
        evaluation={
            "stage_bpb": [1.41, 1.36, 1.31],
            "prefix_bpb": [1.41, 1.35, 1.29],
            "stage_accuracy": [0.40, 0.42, 0.44],
            "prefix_accuracy": [0.40, 0.43, 0.45],
            "mean_stage_bpb": 1.36,
            "product_bpb": 1.29,
            "product_accuracy": 0.45,
            "final_path_bpb": 2.5,
            "crossover_gap": -0.02,
            "tokens": 131072,
            "bytes": 400000,
            "intervals": {
                "stage_bpb": [[1.39, 1.43], [1.34, 1.38], [1.29, 1.33]],
                "prefix_bpb": [[1.39, 1.43], [1.33, 1.37], [1.27, 1.31]],
                "product_bpb": [1.27, 1.31],
            },
            "expected_calibration_error": {"stage_0": 0.021, "prefix_3": 0.012},
            "agreement": {
                "names": ["stage_0", "stage_1", "stage_2"],
                "matrix": [[1.0, 0.8, 0.7], [0.8, 1.0, 0.9], [0.7, 0.9, 1.0]],
            },
        },
        exits=[{"safety": 1.0, "exit_shares": [0.6, 0.25, 0.15], "disagreement": 0.0123}],
        exit_shares=[0.6, 0.25, 0.15],
        exit_setting="Shown for WAND at safety 1; 2,048 tokens of text.",
        certificate={"epsilon": 0.05, "delta": 0.05, "n": 256, "loss": "text", "method": "walk"},
        acceptance=[
            {"draft_stage": s, "k_draft": m, "acceptance": 0.9 - 0.03 * m + 0.02 * s}
            for s in range(2)
            for m in (1, 2, 4)
        ],
        routing=[
            {"cap": 0.02, "rate_over": "all", "routed_share": 0.7, "threshold": 1.2, "accuracy_loss_over_all": 0.019}
            | {"projected_speedup": 1.52}
        ],
        bounds=[3.1, 1.4],
        probes=[{"prompt": "The capital of France is", "texts": {"product": " Paris", "expert 0": " the"}}],
        samples=[Sample("import os\n", tokens, "greedy")],
        setting={"parameters": "1.2 M", "hardware": "2 cores"},
    )


def chromium() -> str:
    """The browser's path; its absence is a failure, so that the page is never left unopened."""
    names = [os.environ.get("STAGEWISE_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    assert found, "no Chromium found: install it (Debian: apt-get install chromium) or set STAGEWISE_CHROMIUM"
    return found


def browse(page: Path, profile: Path, *flags: str) -> str:
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={profile}", "--window-size=1180,3900", *flags]
    result = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> str:
    """The page's document after its script ran and the pointer entered the second token."""
    folder = tmp_path_factory.mktemp("page")
    probe = (
        "<script>addEventListener('error', e => document.body.dataset.failed = e.message);"
        "document.querySelectorAll('.token')[1].dispatchEvent(new Event('mouseenter'));"
        "const chart = document.querySelector('svg.chart'); const box = chart.getBoundingClientRect();"
        "document.body.dataset.panel = document.getElementById('tip').innerText;"
        "chart.dispatchEvent(new MouseEvent('mousemove', {clientX: box.left + box.width / 2, clientY: box.top + 9}));"
        "document.body.dataset.values = document.getElementById('tip').innerText;</script></body>"
    )
    page = folder / "report.html"
    page.write_text(render(full_content()).replace("</body>", probe), encoding="utf-8")
    return browse(page, folder / "profile", "--dump-dom")


def test_script_runs_without_error_in_chromium(opened):
    assert 'data-ready="11"' in opened
    assert "data-failed" not in opened


def test_hovering_a_token_lists_five_tokens_of_every_expert_and_the_product(opened):
    panel = re.search(r'data-panel="([^"]*)"', opened).group(1)
    for name in ("expert 0", "expert 1", "expert 2", "product"):
        assert name in panel
    assert panel.count("%") == 5 * PREDICTORS
    assert "decided by expert 1" in panel and "50.0%" in panel


def test_hovering_a_chart_shows_exact_values(opened):
    values = re.search(r'data-values="([^"]*)"', opened).group(1)
    assert re.search(r"step \d+", values) and re.search(r"expert 2 \d\.\d{3}", values)


def test_screenshot_shows_the_page(tmp_path):
    page = write_page(full_content(), tmp_path / "report.html")
    folder = Path(os.environ.get("STAGEWISE_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "report.png"
    browse(page, tmp_path / "profile", f"--screenshot={picture}")
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1180, 3900)
    assert len(data) > 100_000  # an empty page compresses to a few kB


def test_page_asks_for_nothing_outside_itself():
    page = render(full_content())
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href|action|poster|srcset)\s*=", page)
    assert not re.findall(r"@import|url\((?!#)", page)
    assert set(re.findall(r"https?://[^\"' )]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_every_measured_part_has_its_section_and_every_missing_one_has_none():
    titles = ["What the experts say", "Training", "Bits per byte by depth", "Where tokens leave", "Accepted drafts"]
    titles += ["Calibration", "Agreement and confidence", "Probe prompts", "Setting"]
    page = render(full_content())
    assert [t for t in titles if f"<h2>{t}</h2>" in page] == titles
    bare = render(Content(title="bare"))
    assert "<h2>" not in bare and "nan" not in bare.lower()


def test_model_trained_end_to_end_reports_only_its_final_path():
    page = render(Content("bp", config={"poe_mode": "none"}, evaluation={"final_path_bpb": 0.6768, "tokens": 1000}))
    assert "0.6768" in page and "trained end to end" in page
    assert "product" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.S)


def test_text_from_models_cannot_inject_markup():
    page = render(full_content())
    assert "<b>" not in page and "tiny <model>" not in page
    tops = re.findall(r'data-top="([^"]*)"', page)
    assert len(tops) == 11
    json.loads(tops[0].replace("&quot;", '"').replace("&#x27;", "'").replace("&amp;", "&"))


def test_existing_report_is_kept_unless_forced(tmp_path):
    target = tmp_path / "report.html"
    write_page(full_content(), target)
    with pytest.raises(FileExistsError, match="--force"):
        write_page(Content("other"), target)
    assert "tiny" in target.read_text(encoding="utf-8")
    write_page(Content("other"), target, force=True)
    assert "other" in target.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
