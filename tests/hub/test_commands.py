"""The hub's commands from the command line: what they print, and one line with status 2 when something is wrong."""

import json
import shutil

import pytest

from stagewise.cli import main


def test_export_card_and_dry_publish_follow_one_another(checkpoint, tmp_path, capsys):
    source = shutil.copytree(checkpoint, tmp_path / "step-000100")
    (source / "eval").mkdir()
    (source / "eval" / "evaluation.json").write_text(json.dumps({"product_bpb": 1.5, "stage_bpb": [1.6, 1.55, 1.5]}))
    assert main(["card", str(source), "--name", "owner/tiny"]) == 0
    assert main(["export", str(source), str(tmp_path / "release"), "--dtype", "bfloat16"]) == 0
    capsys.readouterr()
    assert (
        main(["publish", str(tmp_path / "release"), "--repo", "owner/tiny", "--revision", "step-100", "--dry-run"]) == 0
    )
    shown = capsys.readouterr().out
    assert "owner/tiny@step-100" in shown and "README.md" in shown and "eval/evaluation.json" in shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["card", "MODEL"], "stagewise evaluate"),
        (["publish", "MODEL", "--repo", "no good"], "not a valid repository name"),
        (["export", "MODEL", "MODEL", "--force"], "choose another folder"),
        (["export", "MODEL", "OUT", "--parent", "owner/base"], "whole weights"),
        (["publish", "NOTHING", "--repo", "owner/model"], "not a folder"),
        (["report", "NOTHING"], "not a folder"),
        (["trajectory", "MODEL"], "holds no checkpoints"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, words, checkpoint, tmp_path, capsys):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out"), "NOTHING": str(tmp_path / "nothing")}
    assert main([places.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
