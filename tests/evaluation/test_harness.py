from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stagewise.evaluation.harness import CORE_TASKS, Scorer, cut_at, evaluate_tasks, expand_tasks, lm_class
from stagewise.evaluation.suite import measure
from stagewise.modeling.decoding import decode
from stagewise.modeling.sampling import SamplingParams


@pytest.fixture(scope="module")
def lm(model_folder):
    """Build the lm-eval model of the small folder."""
    return lambda **settings: lm_class()(pretrained=str(model_folder), device="cpu", batch_size=3, **settings)


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


PAIRS = [("The expert of", " a stage"), ("", "Early exits"), ("def pool(", "logits, weights):"), ("12 and ", "345")]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Three local tasks: text to score, choices, and text to generate."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [{"text": "The expert of a stage predicts."}, {"text": "Naïve, but it works."}, {"text": "0, 12, 345"}]
    choices = [{"q": "Early exits", "choices": [" answer", " fail"], "gold": 0}] * 2
    for name, rows in (("documents", documents), ("choices", choices)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name, data, body):
        text = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / data}.jsonl\n"
        (folder / f"{name}.yaml").write_text(text + "test_split: test\n" + body)

    task(
        "local_text",
        "documents",
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n",
    )
    task(
        "local_choice",
        "choices",
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n",
    )
    task(
        "local_answer",
        "choices",
        'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: " answer"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 5\nmetric_list:\n  - metric: exact_match\n',
    )
    return folder


@pytest.mark.parametrize(
    ("mode", "depth", "figure"),
    [
        ("full", None, "product_bpb"),
        ("speculative", None, "product_bpb"),
        ("final", None, "final_path_bpb"),
        ("prefix", 2, ("prefix_bpb", 1)),
        ("stage", 1, ("stage_bpb", 1)),
    ],
)
def test_bits_per_byte_of_lm_eval_is_our_bpb(lm, task_folder, mode, depth, figure):
    model = lm(mode=mode, depth=depth)
    found = evaluate_tasks(model, ["local_text"], task_folder=task_folder, bootstrap=0)
    texts = [json.loads(line)["text"] for line in (task_folder / "documents.jsonl").read_text().splitlines()]
    tokenizer = model.tokenizer
    ids = [tokenizer.encode_ordinary(text) for text in texts]
    figures = measure(model.model, ids, tokenizer.token_byte_lengths, tokenizer.bos_token_id).figures()
    ours = figures[figure] if isinstance(figure, str) else figures[figure[0]][figure[1]]
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-6)


def test_documents_longer_than_the_context_score_alike_too(lm, sample_text):
    model = lm(max_length=24)
    total = model.loglikelihood_rolling(requests((sample_text,)), disable_tqdm=True)[0]
    ids = model.tokenizer.encode_ordinary(sample_text)
    assert len(ids) > 48
    measurement = measure(
        model.model, [ids], model.tokenizer.token_byte_lengths, model.tokenizer.bos_token_id, context=24
    )
    assert -total == pytest.approx(measurement.nats[measurement.names.index("prefix_3")].sum(), rel=1e-6)


def test_local_tasks_of_every_kind_run_offline(lm, task_folder):
    found = evaluate_tasks(lm(), ["local_choice", "local_answer"], task_folder=task_folder, bootstrap=0)
    assert found["results"]["local_choice"]["acc,none"] in (0.0, 1.0)
    assert 0.0 <= found["results"]["local_answer"]["exact_match,none"] <= 1.0
    assert found["n-samples"]["local_choice"]["effective"] == 2
    with pytest.raises(ValueError, match="no task absent"):
        evaluate_tasks(lm(), ["absent"], task_folder=task_folder)


def test_log_likelihoods_are_the_models_own_in_any_batch(lm):
    model = lm()
    together = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    model.batch_size = 1
    alone = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (total, greedy), other in zip(PAIRS, together, alone, strict=True):
        whole = model.tokenizer.ensure_bos(model.tokenizer.encode(context + continuation, add_special_tokens=False))
        first = len(model.tokenizer.ensure_bos(model.tokenizer.encode(context.rstrip(), add_special_tokens=False)))
        logp = model.model.forward_aggregated(torch.tensor([whole[:-1]]))[0]
        targets = torch.tensor(whole[1:])
        expected = logp.gather(-1, targets[:, None])[first - 1 :].sum()
        assert total == pytest.approx(float(expected), rel=1e-5) == pytest.approx(other[0], rel=1e-5)
        assert greedy == bool((logp.argmax(-1) == targets)[first - 1 :].all()) == other[1]


def test_a_greedy_continuation_is_said_to_be_greedy(lm):
    model = lm()
    scorer, bos = model.scorer, model.eot_token_id
    ids = [bos, *model.tokenizer.encode_ordinary("Early exits")]
    new = decode(model.model, [ids], "full", SamplingParams(max_new_tokens=4, stop_tokens=())).tokens[0]
    stream = ids + new
    targets = [-1] * (len(ids) - 1) + new
    _, greedy = scorer.score(torch.tensor([stream[:-1]]), torch.tensor([targets]))
    assert greedy[0, len(ids) - 1 :].all()


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [
        ({"mode": "full"}, "full"),
        ({"mode": "prefix", "depth": 2}, "prefix:2"),
        ({"mode": "stage", "depth": 0}, "stage:0"),
        ({"mode": "speculative", "k_draft": 2}, "full"),
    ],
)
def test_generation_runs_in_the_mode_asked_for(lm, settings, strategy):
    model = lm(**settings)
    texts = model.generate_until(
        requests(*((context, {"until": [], "max_gen_toks": 8}) for context, _ in PAIRS)), disable_tqdm=True
    )
    prompts = [model.tok_encode(context) for context, _ in PAIRS]
    result = decode(model.model, prompts, strategy, SamplingParams(max_new_tokens=8))
    assert texts == [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in result.tokens]


def test_generation_stops_before_the_stop_string(lm):
    model = lm()
    free = model.generate_until(requests(("Early", {"max_gen_toks": 12})), disable_tqdm=True)[0]
    stop = free[4:6]
    cut = model.generate_until(requests(("Early", {"until": [stop], "max_gen_toks": 12})), disable_tqdm=True)[0]
    assert cut == free[: free.index(stop)]
    assert cut_at("a;b\nc", ["\n", ";"]) == "a"


def test_a_long_prompt_loses_its_beginning_but_not_its_bos(lm, sample_text, monkeypatch):
    model = lm(max_length=20)
    seen = []
    real = decode
    monkeypatch.setattr(
        "stagewise.modeling.decoding.decode",
        lambda m, prompts, *a, **k: seen.extend(prompts) or real(m, prompts, *a, **k),
    )
    model.generate_until(requests((sample_text, {"max_gen_toks": 6})), disable_tqdm=True)
    ids = model.tokenizer.encode_ordinary(sample_text)
    assert seen == [[model.eot_token_id, *ids[-13:]]]


def test_wand_scores_each_position_by_the_product_at_its_exit(lm):
    model = lm().model
    model.config.poe_wand_p99_bounds_per_stage_head = [0.4, 0.2]
    ids = torch.randint(0, 311, (2, 30), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    got, _ = Scorer(model, "wand", safety=1.0).score(inputs, targets)
    prefixes = torch.stack([model.forward_aggregated(inputs, k) for k in (1, 2, 3)])  # (K, B, T, V)
    top = prefixes.topk(2).values
    margin = top[..., 0] - top[..., 1]
    depth = torch.where(margin[0] > 0.4 + 0.2, 0, torch.where(margin[1] > 0.2, 1, 2))
    logp = prefixes.gather(-1, targets.expand(3, 2, 29)[..., None])[..., 0]
    assert torch.allclose(got.float(), logp.gather(0, depth[None])[0], atol=1e-5)
    assert depth.unique().numel() > 1


def test_an_end_to_end_model_has_its_final_path_and_nothing_else(end_to_end_folder):
    model = lm_class()(pretrained=str(end_to_end_folder), device="cpu")
    total, _ = model.loglikelihood(requests(("The", " expert")), disable_tqdm=True)[0]
    ids = torch.tensor([model.tok_encode("The expert")])
    with torch.no_grad():
        logp = model.model(ids[:, :-1]).logits.log_softmax(-1)[0]
    first = len(model.tok_encode("The"))
    assert total == pytest.approx(float(logp.gather(-1, ids[0, 1:, None])[first - 1 :].sum()), rel=1e-5)
    with pytest.raises(ValueError, match="poe_mode"):
        lm_class()(pretrained=str(end_to_end_folder), device="cpu", mode="prefix", depth=1)


def test_model_args_are_read_from_a_string_and_wrong_ones_are_named(model_folder):
    from lm_eval.api.registry import get_model

    made = get_model("stagewise").create_from_arg_string(
        f"pretrained={model_folder},mode=prefix,depth=1", {"batch_size": 2, "device": "cpu"}
    )
    assert (made.scorer.name, made.batch_size, made.strategy.max_stages) == ("prefix_1", 2, 1)
    for arguments, message in [
        ({"mode": "deep"}, "mode='deep'"),
        ({"mode": "prefix"}, "need a depth"),
        ({"mode": "full", "depth": 1}, "take none"),
        ({"mode": "prefix", "depth": 4}, "1 to 3 stages"),
        ({"max_length": 4096}, "max_length=4096"),
    ]:
        with pytest.raises(ValueError, match=message):
            lm_class()(pretrained=str(model_folder), device="cpu", **arguments)
    with pytest.raises(ValueError, match="not understood: beam"):
        made._generation({"beam": 4})


def test_the_core_list_names_tasks_that_lm_eval_has():
    import lm_eval.tasks

    folders = "hellaswag bigbench arc super_glue commonsense_qa piqa openbookqa lambada wsc273 winogrande agieval"
    named = set()
    for folder in [*folders.split(), "squad_completion", "coqa"]:
        for path in (Path(lm_eval.tasks.__file__).parent / folder).rglob("*"):
            if path.suffix in (".yaml", ".py"):
                for line in path.read_text(errors="replace").splitlines():
                    words = line.strip("- ").split()
                    if len(words) > 1 and words[0] == "task:":
                        named.add(words[1])
    wanted = {task for _, task, _ in CORE_TASKS if task is not None}
    assert {task for task in wanted - named if task != "squad_completion"} == set()
    assert len(CORE_TASKS) == 22 and expand_tasks(["core"])[0] == ("hellaswag", 0)
    assert expand_tasks(["boolq"]) == [("boolq", None)]
