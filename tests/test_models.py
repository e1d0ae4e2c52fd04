"""Shapes: of known models, of config.json files in their several spellings, of numbers."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adaptive_moe.models import (
    Model,
    ModelError,
    find_model,
    hub_config,
    known,
    known_models,
    model_from_config,
    title_of,
)
from adaptive_moe.shape import SortingShape


def written(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("mixtral-8x7b", (8, 2, 4096)),
        ("mixtral-8x22b", (8, 2, 6144)),
        ("DeepSeek-V3", (256, 8, 7168)),
        ("deepseek-v3-fused", (257, 9, 7168)),
        ("kimi-k2-fused", (385, 9, 7168)),
        ("qwen3-235b", (128, 8, 4096)),
        ("qwen3-30b", (128, 8, 2048)),
        ("qwen3-next-80b", (512, 10, 2048)),
        ("gpt-oss-20b", (32, 4, 2880)),
        ("gpt-oss-120b", (128, 4, 2880)),
        ("minimax-m2", (256, 8, 3072)),
        ("glm-4.5", (160, 8, 5120)),
        ("llama-4-maverick", (128, 1, 5120)),
    ],
)
def test_known_models(name, numbers):
    model = find_model(name)
    assert (model.num_experts, model.topk, model.model_dim) == numbers


def test_every_known_model_has_a_source_and_a_valid_shape():
    found = known_models()
    assert len([name for name in found if not name.endswith("-fused")]) >= 12
    for model in found.values():
        assert model.source.startswith("https://")
        assert isinstance(model.shape(), SortingShape)


def test_known_models_have_what_a_step_needs():
    for name, model in known_models().items():
        assert model.moe_intermediate_size > 0, name
        before, after = model.attention
        assert before >= after > 0, name
    # Mixtral: 32 heads and twice 8 key and value heads of 128; an expert of 14,336.
    mixtral = find_model("mixtral-8x7b")
    assert (mixtral.moe_intermediate_size, mixtral.attention) == (14336, (48 * 128, 32 * 128))
    assert find_model("deepseek-v3-fused").attention == find_model("deepseek-v3").attention


def test_a_known_model_is_what_its_entry_says():
    mixtral = Model(
        "mixtral-8x7b",
        8,
        2,
        4096,
        "https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json",
        moe_intermediate_size=14336,
        attention=(6144, 4096),
    )
    assert find_model(" Mixtral-8x7B ") == mixtral
    assert mixtral.shape() == SortingShape(8, 2, 4096, "bfloat16", 32)
    assert mixtral.shape(64).block_size == 64
    deepseek = find_model("deepseek-v3")
    assert deepseek.shared_experts == 1
    fused = replace(deepseek, name="deepseek-v3-fused", num_experts=257, topk=9, shared_experts=0)
    assert find_model("deepseek-v3-fused") == fused


def test_an_unknown_model_lists_what_would_work():
    with pytest.raises(ModelError) as refused:
        find_model("GPT-9 ")
    names = ", ".join(known_models())
    assert "deepseek-v3, deepseek-v3-fused, " in names
    assert str(refused.value) == (
        f"model 'GPT-9 ' is not known: give one of {names}; or a Hugging Face id of one of them, "
        "or of a model in the local Hugging Face cache; or --config PATH to its config.json; or "
        "--experts, --topk and --hidden"
    )


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ({"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 4096}, (8, 2, 4096)),
        ({"n_routed_experts": 64, "num_experts_per_tok": 6, "hidden_size": 2048}, (64, 6, 2048)),
        ({"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048}, (128, 8, 2048)),
        ({"num_experts": 32, "experts_per_token": 4, "hidden_size": 2880}, (32, 4, 2880)),
        ({"moe_num_experts": 64, "moe_k": 6, "hidden_size": 2560}, (64, 6, 2560)),
        ({"moe_num_experts": 48, "moe_top_k": 3, "hidden_size": 7168}, (48, 3, 7168)),  # Step-3
        ({"num_experts": 64, "moe_top_k": 6, "hidden_size": 2560}, (64, 6, 2560)),  # XVERSE
        (  # SmallThinker
            {
                "moe_num_primary_experts": 64,
                "moe_num_active_primary_experts": 6,
                "hidden_size": 2560,
            },
            (64, 6, 2560),
        ),
        ({"n_routed_experts": 16, "moe_topk": 4, "hidden_dim": 512}, (16, 4, 512)),
        (
            {
                "model_type": "dbrx",
                "d_model": 6144,
                "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4},
            },
            (16, 4, 6144),
        ),
        (
            {"dim": 4096, "moe": {"num_experts": 8, "num_experts_per_tok": 2}},  # params.json
            (8, 2, 4096),
        ),
        ({"num_experts": [64, 64], "moe_topk": [8, 8], "hidden_size": 4096}, (64, 8, 4096)),
        (
            {
                "model_type": "vision",
                "hidden_size": 1,
                "text_config": {
                    "num_local_experts": 16,
                    "num_experts_per_tok": 1,
                    "hidden_size": 5120,
                },
            },
            (16, 1, 5120),
        ),
        (
            {
                "thinker_config": {
                    "text_config": {
                        "num_experts": 128,
                        "num_experts_per_tok": 8,
                        "hidden_size": 2048,
                    }
                }
            },
            (128, 8, 2048),
        ),
    ],
)
def test_config_spellings(tmp_path, config, numbers):
    model = model_from_config(written(tmp_path, config))
    assert (model.num_experts, model.topk, model.model_dim) == numbers


PLAIN = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64}


def test_a_config_s_facts_are_all_read(tmp_path):
    facts = {
        "model_type": "sorter",
        "moe_intermediate_size": 96,
        "intermediate_size": 512,
        "n_shared_experts": 3,
        "torch_dtype": "float16",
    }
    path = written(tmp_path, PLAIN | facts)
    model = Model("sorter", 8, 2, 64, str(path), "float16", 3, 96)
    assert model_from_config(path) == model
    assert model_from_config(path, fuse_shared=True) == replace(
        model, name="sorter-fused", num_experts=11, topk=5, shared_experts=0
    )
    # A config of a whole language model: its experts' facts are inside.
    path = written(tmp_path, {"model_type": "seer", "text_config": PLAIN | facts})
    assert model_from_config(path) == replace(model, name="seer")
    path = written(tmp_path, PLAIN)
    assert model_from_config(path) == Model(tmp_path.name, 8, 2, 64, str(path), shared_experts=None)


@pytest.mark.parametrize("method", ["quark", "compressed-tensors", "fp8"])
def test_the_quantisation_is_read(tmp_path, method):
    quantised = PLAIN | {"quantization_config": {"quant_method": method}}
    assert model_from_config(written(tmp_path, quantised)).quantisation == method
    assert model_from_config(written(tmp_path, {"text_config": quantised})).quantisation == method
    assert model_from_config(written(tmp_path, PLAIN)).quantisation == ""


@pytest.mark.parametrize("name", ["expert_ffn_hidden_size", "moe_ffn_hidden_size"])
def test_the_width_of_an_expert_has_several_names(tmp_path, name):
    path = written(tmp_path, PLAIN | {name: 768, "intermediate_size": 9000})
    assert model_from_config(path).moe_intermediate_size == 768


def test_a_config_without_a_model_type_is_named_by_its_folder_or_itself(tmp_path, monkeypatch):
    folder = tmp_path / "Sorter-8x"
    folder.mkdir()
    assert model_from_config(written(folder, PLAIN)).name == "Sorter-8x"
    monkeypatch.chdir(folder)
    assert model_from_config(Path("config.json")).name == "config"


def test_two_experts_are_a_mixture(tmp_path):
    assert model_from_config(written(tmp_path, PLAIN | {"num_experts": 2})).num_experts == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"num_experts": "8"},
            "num_experts or n_routed_experts or num_local_experts or moe_num_experts or "
            "moe_num_primary_experts is '8'",
        ),
        (
            {"num_experts_per_tok": True},
            "num_experts_per_tok or num_experts_per_token or moe_topk or moe_top_k or moe_k or "
            "experts_per_token or top_k_experts or moe_num_active_primary_experts is True",
        ),
        ({"hidden_size": 0}, "hidden_size or hidden_dim or d_model or n_embd or dim is None"),
    ],
)
def test_a_count_that_is_none_is_refused_by_all_its_spellings(tmp_path, change, says):
    path = written(tmp_path, PLAIN | change)
    with pytest.raises(ModelError) as refused:
        model_from_config(path)
    assert str(refused.value) == f"config {path}: {says}, not a positive integer"


@pytest.mark.parametrize("file", ["config.json", "params.json"])
def test_a_folder_of_weights_is_read_by_its_config(tmp_path, file):
    (tmp_path / file).write_text('{"num_experts": 8, "num_experts_per_tok": 2, "dim": 64}')
    assert model_from_config(tmp_path).topk == 2


def test_a_folder_without_a_config_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"without config.json or params.json"):
        model_from_config(tmp_path)


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("openai/GPT-oss-120b", "gpt-oss-120b"),
    ],
)
def test_hugging_face_ids_of_known_models(model_id, name):
    assert find_model(model_id).name == name


def test_each_id_names_one_model():
    ids = [alias for facts in known._facts().values() for alias in known._ids(facts)]
    assert len(ids) == len({alias.lower() for alias in ids}) > 16


def cached(hub: Path, snapshot: str = "abc") -> Path:
    """A model as the Hugging Face cache keeps it."""
    folder = hub / "models--acme--Sorter-8x" / "snapshots" / snapshot
    folder.mkdir(parents=True)
    return written(folder, PLAIN | {"num_experts_per_tok": 3, "n_shared_experts": 1})


def test_another_id_is_looked_up_in_the_local_cache_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="local Hugging Face cache"):
        find_model("acme/Sorter-8x")
    cached(tmp_path)
    assert find_model(" acme/Sorter-8x").topk == 3
    assert find_model("acme/Sorter-8x", fuse_shared=True).topk == 4


def test_the_cache_s_main_revision_counts(tmp_path):
    old, new = cached(tmp_path, "aaa"), cached(tmp_path, "bbb")
    refs = tmp_path / "models--acme--Sorter-8x" / "refs"
    refs.mkdir()
    (refs / "main").write_text("bbb\n")
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    assert hub_config("acme/Sorter-8x", environ) == new
    (refs / "main").write_text("aaa")
    assert hub_config("acme/Sorter-8x", environ) == old


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        (["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"], ""),
        (["HF_HOME", "XDG_CACHE_HOME"], "hub"),
        (["XDG_CACHE_HOME"], "huggingface/hub"),
        ([], ".cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_hugging_face_has_it(tmp_path, monkeypatch, variables, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    where = cached(tmp_path / folder)
    environ = dict.fromkeys(variables, str(tmp_path))
    assert hub_config("acme/Sorter-8x", environ) == where
    assert hub_config("acme/Sorter-9x", environ) is None
    for odd in ("acme--Sorter-8x", "acme/Sorter/8x", "../etc"):
        assert hub_config(odd, environ) is None


@pytest.mark.parametrize(
    ("shared", "more"),
    [({"n_shared_experts": 2}, 2), ({"shared_expert_intermediate_size": 512}, 1)],
)
def test_shared_experts_are_fused_on_request_only(tmp_path, shared, more):
    config = {"n_routed_experts": 64, "num_experts_per_tok": 6, "hidden_size": 2048, **shared}
    path = written(tmp_path, config)
    assert model_from_config(path).num_experts == 64
    fused = model_from_config(path, fuse_shared=True)
    assert (fused.num_experts, fused.topk) == (64 + more, 6 + more)


def test_fusing_nothing_is_an_error(tmp_path):
    config = {"n_routed_experts": 64, "num_experts_per_tok": 6, "hidden_size": 2048}
    path = written(tmp_path, config | {"n_shared_experts": 0})
    with pytest.raises(ModelError) as refused:
        model_from_config(path, fuse_shared=True)
    assert str(refused.value) == (
        f"{tmp_path.name} ({path}) has no shared experts, so there is nothing to fuse: leave "
        "--fuse-shared out"
    )
    written(tmp_path, config)
    with pytest.raises(ModelError, match=r"config\.json does not say whether it has shared"):
        model_from_config(path, fuse_shared=True)
    with pytest.raises(ModelError, match="no shared experts"):
        find_model("mixtral-8x7b", fuse_shared=True)
    fused = find_model("deepseek-v3-fused")
    for name in ("deepseek-v3", "deepseek-v3-fused", "deepseek-ai/DeepSeek-R1"):
        assert find_model(name, fuse_shared=True) == fused


def test_shared_experts_of_another_width_are_not_fused(tmp_path):
    """As in Qwen1.5-MoE, whose shared expert is four times as wide."""
    facts = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
    path = written(tmp_path, PLAIN | facts)
    assert model_from_config(path).num_experts == 8
    with pytest.raises(ModelError, match=r"another width \(5632\) than the routed ones \(1408\)"):
        model_from_config(path, fuse_shared=True)
    path = written(tmp_path, PLAIN | facts | {"shared_expert_intermediate_size": 1408})
    assert model_from_config(path, fuse_shared=True).num_experts == 9


def test_people_know_a_sort_by_its_model():
    assert title_of(256, 8, 7168) == "DeepSeek-V3"
    assert title_of(257, 9, 7168) == "DeepSeek-V3 with its shared experts"
    assert title_of(128, 8, 4096) == "Qwen3-235B-A22B or GLM-4.5-Air"
    assert title_of(7, 3, 64) == ""


def test_without_tomli_names_are_refused_in_words_and_titles_are_empty(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    title_of.cache_clear()
    with pytest.raises(ModelError, match="pip install tomli"):
        find_model("deepseek-v3")
    assert title_of(256, 8, 7168) == ""
    title_of.cache_clear()


DENSE = (
    "describes no mixture of experts (none of num_experts, n_routed_experts, num_local_experts, "
    "moe_num_experts, moe_num_primary_experts is above 1): a dense model has nothing to sort"
)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama", "hidden_size": 4096}, DENSE),
        ({"num_experts": 0, "hidden_size": 64}, DENSE),
        ({"num_local_experts": 1, "num_experts_per_tok": 1, "hidden_size": 64}, DENSE),
        ({"num_experts": 8, "hidden_size": 64}, "num_experts_per_tok"),
        ({"num_experts": 8, "num_experts_per_tok": "two", "hidden_size": 64}, "'two'"),
        ({"num_experts": True, "num_experts_per_tok": 2, "hidden_size": 64}, DENSE),
        ("[1, 2]", "list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_config_without_a_shape_says_why(tmp_path, config, says):
    path = written(tmp_path, config)
    with pytest.raises(ModelError) as refused:
        model_from_config(path)
    assert says in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_missing_config_is_named(tmp_path):
    path = tmp_path / "nowhere.json"
    with pytest.raises(ModelError) as refused:
        model_from_config(path)
    assert str(refused.value) == f"config {path} cannot be read: No such file or directory"


def test_a_config_that_is_no_config_is_not_read_whole(tmp_path):
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(5 << 20)
    for path, says in ((weights, "more than 4194304 bytes"), (Path("/dev/zero"), "is no file")):
        with pytest.raises(ModelError, match=says):
            model_from_config(path)


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.float32"}, "float32"),
        ({"torch_dtype": "float8_e4m3fn"}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_the_buffer_dtype_comes_from_the_config_where_it_can(tmp_path, said, dtype):
    config = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64}
    assert model_from_config(written(tmp_path, config | said)).shape().dtype == dtype
    nested = {"text_config": config | said}
    assert model_from_config(written(tmp_path, nested)).shape().dtype == dtype
    assert model_from_config(written(tmp_path, nested)).shape(dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 0),
        ("num_experts", 1025),
        ("num_experts", 8.0),
        ("topk", 9),
        ("topk", True),
        ("model_dim", -1),
        ("block_size", 0),
        ("dtype", "int8"),
        ("local_experts", 0),
        ("local_experts", 9),
    ],
)
def test_a_shape_refuses_by_field_and_value(field, value):
    good = {"num_experts": 8, "topk": 2, "model_dim": 64}
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        SortingShape(**{**good, field: value})
