"""Commands of the calibration room: `calibrate`, `audit`, `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stagewise.calibration.wand_bounds import MINIMUM_TOKENS

Dtype = Literal["float32", "bfloat16", "float16"]


def __getattr__(name: str) -> Any:
    """`audit` and `tune`, imported when asked for: they time decoding and load more than calibration needs."""
    if name == "audit":
        from stagewise.calibration.audit import audit_command

        return audit_command
    if name == "tune":
        from stagewise.calibration.tune import tune_command

        return tune_command
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def calibrate(
    model: str,
    *,
    data: list[str] | None = None,
    tokens: int = MINIMUM_TOKENS,
    allow_fewer_tokens: bool = False,
    caps: list[float] | None = None,
    draft_lengths: list[int] | None = None,
    prompts: int = 256,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    epsilon: float = 0.05,
    delta: float = 0.05,
    loss: Literal["text", "token"] = "text",
    seed: int = 0,
    dry_run: bool = False,
    json: Path | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> None:
    """Measure exit bounds, routing, draft acceptance and a certificate, and store them in the model folder.

    The bounds go into config.json, the certificate into certificate.json, everything into calibration.json.

    Parameters
    ----------
    model
        A model folder; a repository is measured, nothing is stored.
    data
        The word embedded, or files of text, .jsonl or .parquet; default: what the model's own run held out, else
        embedded.
    tokens
        Tokens the bounds are measured on, at least 131,072.
    allow_fewer_tokens
        Accept rougher bounds from fewer tokens.
    caps
        Largest accepted rates of regression in the routing probe.
    draft_lengths
        Draft lengths to report acceptance for.
    prompts
        Prompts to certify on; no failure among n certifies about 3/n.
    prompt_tokens
        Tokens of a prompt, taken from documents that the bounds are not measured on.
    new_tokens
        Tokens the full model continues a prompt by.
    epsilon
        Disagreement that the certificate bounds.
    delta
        Chance that the certificate is wrong.
    loss
        What disagrees: the text of a prompt as a whole, or the share of its tokens.
    seed
        Seed of the places prompts are taken from.
    dry_run
        Measure and print, store nothing.
    json
        A further file for the result.
    dtype
        Weight type to load; default: as stored.
    device
        Where to run; default: the accelerator where there is one.

    Example: stagewise calibrate runs/lab/model --tokens 200000 --epsilon 0.05
    """
    from stagewise.calibration.certificate import store_certificate
    from stagewise.calibration.suite import calibrate_model
    from stagewise.calibration.tables import show_calibration
    from stagewise.calibration.wand_bounds import store_bounds
    from stagewise.evaluation.provenance import write_json

    result = calibrate_model(
        model,
        data,
        tokens,
        allow_fewer_tokens=allow_fewer_tokens,
        caps=caps,
        draft_lengths=draft_lengths,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        epsilon=epsilon,
        delta=delta,
        loss=loss,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    show_calibration(result)
    if json is not None:
        write_json(json, result)
    folder = Path(model)
    if dry_run or not folder.is_dir():
        print(f"nothing stored{'' if dry_run else f': {model} is not a folder'}")
        return
    store_bounds(folder, result["p99_bounds"])
    write_json(folder / "calibration.json", result)
    if "certificate" in result:
        store_certificate(folder, result["certificate"])
    else:
        (folder / "certificate.json").unlink(missing_ok=True)  # one for other bounds promises nothing here
    print(f"stored in {folder}: config.json, calibration.json{', certificate.json' if 'certificate' in result else ''}")
