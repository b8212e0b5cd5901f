"""Recipes: the shipped ones are right, mistakes are named, scaling gives the numbers of the rule."""

import math

import pytest

from stagewise.recipe import load_recipe, recipe_names, show

BASES = {"bp-1.3b": 1_384_122_122, "poe-1.3b": 1_384_122_122, "poe-1.5b": 1_507_591_082, "poe-3b": 3_019_900_506}
SPECIALISTS = {
    "stage-chat": 1_491_076_878,
    "stage-tool": 1_547_699_986,
    "stage-math": 1_547_699_986,
    "stage-code": 1_547_699_986,
}


def test_the_promised_recipes_are_shipped():
    assert {"quickstart", "lab", *BASES, *SPECIALISTS} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_valid_and_named_after_its_file(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_writing_and_reading(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(("name", "parameters"), [*BASES.items(), *SPECIALISTS.items()])
def test_released_shapes_have_the_cards_parameter_counts(name, parameters):
    assert load_recipe(name).parameters == parameters


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("poe-1.3b", 27_713_863_680),
        ("poe-1.5b", 62_914_560_000),
        ("poe-3b", 65_999_732_736),
        ("stage-chat", 360_185_856),
    ],
)
def test_released_runs_have_the_cards_token_counts(name, tokens):
    assert load_recipe(name).tokens == tokens


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).specialist is None])
def test_a_recipes_arithmetic_counts_what_the_model_has(name):
    import torch

    from stagewise.modeling import PoEConfig, PoEForCausalLM

    recipe = load_recipe(name)
    with torch.device("meta"):
        model = PoEForCausalLM(PoEConfig(**recipe.model.config_arguments()))
    assert recipe.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", BASES)
def test_recipes_and_config_presets_describe_the_same_model(name):
    from stagewise.modeling import PoEConfig

    preset = PoEConfig.preset(name).to_dict()
    ours = PoEConfig(**load_recipe(name).model.config_arguments()).to_dict()
    assert ours == preset


def test_specialist_recipes_stand_on_the_released_base():
    for name in SPECIALISTS:
        model = load_recipe(name).model
        base = load_recipe("poe-1.3b").model
        assert model.config_arguments() == base.config_arguments()


def test_shares_of_the_published_mixes_add_up():
    v1 = load_recipe("poe-3b").data.sources
    assert sum(source.share for source in v1) == pytest.approx(100.0)
    v2 = load_recipe("poe-1.5b").data.sources
    assert sum(source.share for source in v2 if not source.train_only) == pytest.approx(100.0)
    assert [source.name for source in v2 if source.train_only] == ["openorca"]


# --- scaling ---------------------------------------------------------------------------------------------------------


def test_scaling_of_the_1_3b_release_is_pinned():
    rates = load_recipe("poe-1.3b").scaled_rates()  # twice the reference batch: every rate times sqrt(2)
    assert rates["matrix_lr"] == pytest.approx(0.02 * math.sqrt(2))
    assert rates["embedding_lr"] == pytest.approx(0.3 * math.sqrt(2))
    assert rates["unembedding_lr"] == pytest.approx(0.008 * math.sqrt(2))
    assert rates["scalar_lr"] == pytest.approx(0.5 * math.sqrt(2))
    assert rates["smear_lr"] == 0.2
    twelve_layers = 12 * 12 * 768**2 + 6 * 6 * 12 + 32768 * 768  # matrices, value gates, one head
    this = 24 * 12 * 1536**2 + 12 * 12 * 12 + 32768 * 1536
    assert rates["weight_decay"] == pytest.approx(0.28 * math.sqrt(2) * twelve_layers / this)
    assert rates["weight_decay"] == pytest.approx(0.059738, abs=1e-6)


def test_rates_of_embeddings_and_heads_fall_with_the_root_of_the_width():
    rates = load_recipe("poe-1.3b").group_rates()
    width = math.sqrt(768 / 1536)
    assert rates["wte"] == (0.3, pytest.approx(0.3 * math.sqrt(2) * width))
    assert rates["value_embeds"][1] == pytest.approx(rates["wte"][1] / 2)
    assert rates["heads"][1] == pytest.approx(0.008 * math.sqrt(2) * width)
    assert rates["resid_lambdas"][1] == pytest.approx(0.01 * rates["x0_lambdas"][1])
    assert rates["smear, backout"] == (0.2, 0.2)


def test_nothing_scales_at_the_reference_size():
    twelve = ["model.hidden_size=768", "model.num_hidden_layers=12", "model.num_attention_heads=6"]
    twelve += ["model.num_key_value_heads=6", "model.poe_stage_layers=[3,3,3,3]", "model.intermediate_size=3072"]
    recipe = load_recipe("poe-1.3b", [*twelve, "training.batch_tokens=524288"])
    rates = recipe.scaled_rates()
    assert all(rates[name] == pytest.approx(getattr(recipe.optimizer, name)) for name in rates)


def test_specialist_rates_are_the_cards():
    chat, tool = load_recipe("stage-chat").group_rates(), load_recipe("stage-tool").group_rates()
    assert chat["matrices"] == (0.02, pytest.approx(0.02 * 0.2))
    assert tool["matrices"] == (0.002, pytest.approx(0.002 * 0.2))
    assert chat["resid_lambdas"][1] == pytest.approx(0.5 * 0.2 * 0.01)
    assert chat["x0_lambdas"][1] == pytest.approx(0.5 * 0.2)
    assert chat["lm_head_stage"] == (1e-4, pytest.approx(1e-4 * math.sqrt(768 / 1536)))
    assert chat["matrices' weight decay"] == (0.0, 0.0)


def test_show_prints_both_values_and_what_the_run_comes_to(capsys):
    show("poe-1.3b", set=["training.steps=10"])
    shown = capsys.readouterr().out
    assert "1,384,122,122" in shown
    assert "10,485,760" in shown
    line = next(line for line in shown.splitlines() if line.strip().startswith("matrices "))
    assert line.split() == ["matrices", "0.02", "0.0282843"]


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_are_read_as_yaml_and_reach_any_depth():
    recipe = load_recipe("quickstart", ["training.steps=7", "optimizer.matrix_lr=1e-3", "model.window_pattern=L"])
    assert (recipe.training.steps, recipe.optimizer.matrix_lr, recipe.model.window_pattern) == (7, 1e-3, "L")
    assert load_recipe("quickstart", {"training.steps": 7}).training.steps == 7


def test_sizes_left_out_follow_the_overridden_ones():
    model = load_recipe("lab", ["model.hidden_size=96"]).model
    assert (model.head_dim, model.intermediate_size) == (16, 384)
    assert "preset" not in model.config_arguments()


@pytest.mark.parametrize("path", ["texts/", "a/*.jsonl.zst", "*.parquet"])
def test_a_hub_source_is_replaced_by_a_local_path(path):
    recipe = load_recipe("poe-3b", [f"data.sources.dclm.path={path}"])
    source = next(source for source in recipe.data.sources if source.name == "dclm")
    assert (source.path, source.share) == (path, 24.1)


@pytest.mark.parametrize(("path", "kind"), [("chat.jsonl", "jsonl"), ("chat-*.parquet", "parquet")])
def test_a_hub_source_of_conversations_is_replaced_by_a_local_path(path, kind):
    recipe = load_recipe("stage-chat", [f"specialist.conversations.smoltalk.path={path}"])
    assert (recipe.specialist.conversations[0].kind, recipe.specialist.conversations[0].path) == (kind, path)


def test_recipes_sources_are_what_the_data_room_reads():
    from stagewise.data.conversations import ConversationSource
    from stagewise.data.sources import SourceSpec

    for name in recipe_names():
        recipe = load_recipe(name)
        for source in recipe.data.sources:
            spec = SourceSpec.of(source)
            assert {key: spec.as_dict()[key] for key in source.model_fields_set} == source.model_dump(
                exclude_unset=True
            )
        for source in recipe.specialist.conversations if recipe.specialist else []:
            given = source.model_dump(exclude_unset=True)
            spec = ConversationSource.parse(source)
            assert {key: getattr(spec, key) for key in given} == given


def test_a_list_entry_is_reached_by_index_too():
    assert load_recipe("poe-3b", ["data.sources.1.share=2"]).data.sources[1].share == 2


def test_a_preset_is_refined_by_the_fields_beside_it():
    model = load_recipe("lab", ["model.preset=poe-1.3b", "model.num_hidden_layers=12"]).model
    assert (model.vocab_size, model.num_hidden_layers, model.intermediate_size) == (4096, 12, 6144)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", r"unknown key training\.step; did you mean training\.steps\?"),
        ("optimzer.matrix_lr=1", r"unknown key optimzer; did you mean optimizer\?"),
        ("data.sources.0.pth=x", r"unknown key data\.sources\.0\.pth; did you mean data\.sources\.0\.path\?"),
        ("training.zzzz=3", r"unknown key training\.zzzz; known: steps, batch_tokens"),
        ("model.preset=poe-3", r"unknown preset 'poe-3'; did you mean poe-3b\?"),
        ("model.poe_stage_layers=[2,2]", r"poe_stage_layers=\[2, 2\] sums to 4, not to num_hidden_layers=8"),
        ("model.poe_stage_layers=null", r"poe_mode='\w+' needs poe_stage_layers"),
        ("model.poe_mode=none", r"per_stage_head needs a stage objective"),
        ("model.poe_mode=deep", r"model\.poe_mode: .*'residual_logop'"),
        ("model.vocab_size=264", r"vocab_size=264 is smaller than the 256 bytes and 9 special tokens"),
        ("model.num_attention_heads=5", r"num_attention_heads=5 does not divide hidden_size=\d+"),
        ("model.num_key_value_heads=4", r"num_key_value_heads=4 does not divide num_attention_heads=6"),
        ("model.window_pattern=SXL", r"window_pattern='SXL' may hold only"),
        ("tokenizer.vocab_size=300", r"tokenizer\.vocab_size=300 is not model\.vocab_size"),
        ("training.steps=many", r"training\.steps: .*got 'many'"),
        ("training.steps=0", r"training\.steps: .*greater than 0"),
        ("training.sequence_length=4096", r"training\.sequence_length=4096 is longer than the context"),
        ("training.micro_batch=7", r"training\.batch_tokens=\d+ is not a multiple of .*7 x 256"),
        ("data.sources=[]", r"data\.sources is empty"),
        ("data.sources=[{name: a, kind: jsonl}]", r"source 'a' of kind jsonl needs path"),
        ("data.sources=[{name: a, kind: hub}]", r"source 'a' of kind hub needs repo"),
        ("data.sources=[{name: a, kind: embedded}, {name: a, kind: embedded}]", r"two sources are named 'a'"),
        ("data.sources.nope.path=x", r"no entry 'nope'; known: standard-library"),
        ("data.validation_fraction=2", r"data\.validation_fraction: .*less than or equal to 1"),
        ("training.steps.x=1", r"'steps' is a value, not a section"),
        ("training.steps", r"not of the form section\.key=value"),
        ("model.hidden_size=null", r"model\.hidden_size: "),
    ],
)
def test_a_mistake_is_named_with_its_key(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe("quickstart", [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_or_suggests_known_ones():
    with pytest.raises(ValueError, match=r"no recipe named 'quickstrt'; did you mean quickstart\?"):
        load_recipe("quickstrt")
    with pytest.raises(ValueError, match="known: .*poe-3b"):
        load_recipe("zzzz")


def test_a_missing_or_broken_file_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe file .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("model: [1,\n")
    with pytest.raises(ValueError, match=r"broken\.yaml is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="no mapping of recipe sections"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ValueError, match=r"binary\.yaml is not YAML"):
        load_recipe(tmp_path / "binary.yaml")


def test_a_recipe_cannot_be_changed_after_it_was_checked():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("quickstart").training.steps = 3
