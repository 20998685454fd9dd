"""GPT-2 to and from transformers, against transformers' own model; training from it; LoRA."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from training_case import assert_same_run

from model import cli
from model.checkpoint import LAST, load, load_model
from model.config import Config, LoraConfig, ModelConfig, TrainConfig, resolve
from model.data import load_dataset
from model.fast import FastGPT
from model.hf import as_gpt2, load_hf, write_folder
from model.lora import add_lora, merge_lora
from model.optimize import make_optimizer
from model.parallel import stand_in
from model.prepare import prepare
from model.reference import GPT
from model.safetensors_file import read_safetensors, write_safetensors
from model.weights_file import EVERY, WEIGHTS, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ModelConfig(vocab_size=300, context=24, n_layer=2, n_head=2, n_embd=32)
SHAPE = {"vocab_size": 300, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
ENDS = {"bos_token_id": 256, "eos_token_id": 256}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"


@pytest.fixture(scope="module")
def hf():
    """transformers, whose import and progress bars warn of things that are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers import GPT2Config, GPT2LMHeadModel  # noqa: F401

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        return transformers


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Token shards of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(120)))
    return prepare(str(folder / "text.txt"), "bpe", 300, str(folder / "shards"), 0.1, quiet=True)


def shaken(model, seed=0):
    """Weights large enough that every part of the model matters to the result, biases and gains too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def theirs(hf, **settings):
    torch.manual_seed(0)
    return shaken(hf.GPT2LMHeadModel(hf.GPT2Config(**{**SHAPE, **ENDS, **settings})))


def close(ours, plain, exact):
    """The rule of the whole project: twice the error of plain PyTorch in the same dtype, plus one unit in the last place."""
    error, allowed = ((x.double() - exact).abs().max() for x in (ours, plain))
    return error <= 2 * allowed + torch.finfo(torch.float32).eps * exact.abs().max()


def check_equal(ours, model, context=24):
    """Both forms of ours against transformers' logits, which are the plain ones, and its float64 ones, the exact ones."""
    idx = torch.randint(300, (3, context), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(idx).logits
        exact = model.double()(idx).logits
        model.float()
        assert close(ours(idx)[0], plain, exact)
        assert close(FastGPT.from_reference(ours, backend="cpu")(idx)[0], plain, exact)


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation_function": "gelu"}, {"tie_word_embeddings": False}, {"n_inner": 128, "n_layer": 1}],
    ids=str,
)
def test_theirs_is_ours(hf, tmp_path, settings):
    model = theirs(hf, **settings)
    model.save_pretrained(tmp_path)
    ours, config = load_weights(tmp_path, [], EVERY)
    tied = settings.get("tie_word_embeddings", True)
    assert config.model.context == 24 and (ours.lm_head.weight is ours.transformer.wte.weight) == tied
    check_equal(ours, model)
    assert load_weights(tmp_path, ["context=10"])[1].model.context == 10


@pytest.mark.parametrize("safe", ["sharded", "half"])
def test_several_files_and_16_bits(hf, tmp_path, safe):
    model = theirs(hf)
    if safe == "half":
        model = model.half().float()
        model.half().save_pretrained(tmp_path)
        model.float()
    else:
        model.save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_equal(load_weights(tmp_path, [])[0], model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"act": "gelu"},
        {"tie": False},
        {"bias": False},
        {"pos": "none"},
        {"pos": "sinusoidal"},
        {"bias": False, "pos": "none", "tie": False, "n_layer": 1},
        {"vocab_size": 320, "words": 300},
    ],
    ids=str,
)
def test_ours_is_theirs(hf, tmp_path, settings):
    ours = shaken(GPT(replace(CONFIG, **settings)))
    write_folder(tmp_path / "out", ours, None)
    model = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert model.config.vocab_size == 300
    check_equal(ours, model)
    # And back again, bit for bit.
    back = load_weights(tmp_path / "out", [], EVERY)[0]
    assert all(torch.equal(x, as_gpt2(ours)[name]) for name, x in as_gpt2(back).items())
    with pytest.raises(ValueError, match="holds a model already"):
        write_folder(tmp_path / "out", ours, None)


def test_the_tied_weight_is_written_once(tmp_path):
    write_folder(tmp_path, GPT(CONFIG), None)
    tensors, _ = read_safetensors(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in tensors and tensors["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)


def test_safetensors_are_those_of_the_package(hf, tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "a": torch.randn(3, 5).T,
        "b": torch.arange(4.0).bfloat16(),
        "c": torch.tensor(2.0),
        "d": torch.ones(0, 2),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    header = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0  # so that the numbers are aligned
    for found in (load_file(tmp_path / "x.safetensors"), read_safetensors(tmp_path / "x.safetensors")[0]):
        assert found.keys() == tensors.keys() and all(torch.equal(found[k], x) for k, x in tensors.items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gptj"}, "with model_type gpt2, got 'gptj'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-05, got 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx False, got True"),
        ({"activation_function": "relu"}, "activation_function .*gelu_new.*, got 'relu'"),
        ({"n_inner": 100}, "n_inner .* got 100"),
    ],
)
def test_another_function_is_refused(tmp_path, change, message):
    write_folder(tmp_path, GPT(CONFIG), None)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path, [])


def test_what_is_missing_is_named(tmp_path):
    write_folder(tmp_path, GPT(CONFIG), None)
    with pytest.raises(ValueError, match=r"must hold a tokenizer.json or vocab.bpe or merges.txt"):
        load_hf(f"hf:{tmp_path}")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json must be a file of a saved GPT-2"):
        load_weights(tmp_path, [])
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"must hold model.safetensors, but it does not"):
        load_weights(tmp_path, [])


def test_training_begins_from_theirs_and_goes_back(hf, tokens, tmp_path, capsys):
    """Their model and our tokens: trained, exported with its tokenizer, sampled and checked."""
    start, run, out = tmp_path / "start", tmp_path / "run", tmp_path / "out"
    model = theirs(hf)
    model.save_pretrained(start)
    settings = [f"data={tokens}", f"init=hf:{start}", "context=16", "steps=2", "eval_every=2", "batch=2", "name=run"]
    common = [f"out={tmp_path}", "sample_tokens=4", "eval_batches=0"]
    assert cli.main(["train", *settings, *common, "warmup=0", "lr=1e-9", "min_lr=1e-9", "--quiet"]) == 0
    config = load(run)["config"]
    assert (config["model.n_layer"], config["model.context"], config["model.words"]) == (2, 16, 300)
    trained, _, _ = load_model(run)
    check_equal(trained.to_reference(), model, context=16)  # so small steps change nothing that the budget shows
    assert cli.main(["convert", str(run), f"hf:{out}"]) == 0 and "its tokenizer" in capsys.readouterr().out
    back = hf.GPT2LMHeadModel.from_pretrained(out).eval()
    check_equal(trained.to_reference(), back, context=16)
    own, auto = load_dataset(str(tokens), 0.1, 8).tokenizer, hf.AutoTokenizer.from_pretrained(out)
    assert auto(TEXT)["input_ids"] == own.encode(TEXT).tolist() and auto.eos_token_id == own.end_of_text
    assert cli.main(["sample", f"hf:{out}", "It was", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("It was")
    assert cli.main(["check", f"hf:{out}", "--steps", "1", "--band", "2"]) == 0
    assert cli.main(["convert", f"hf:{out}", str(tmp_path / "w.safetensors")]) == 0
    plain = load_weights(tmp_path / "w.safetensors", [])[0]
    assert torch.equal(plain.transformer.h[0].mlp.c_fc.weight, back.transformer.h[0].mlp.c_fc.weight.T)


def test_another_vocabulary_is_refused(tokens, tmp_path, capsys):
    write_folder(tmp_path / "gpt2", GPT(replace(CONFIG, vocab_size=512)), None)
    assert cli.main(["train", f"data={tokens}", f"init=hf:{tmp_path / 'gpt2'}", "context=16", f"out={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "data must have the 512 tokens" in error and "got 300 BPE tokens" in error
    for words in (["convert", str(tmp_path)], ["convert", "a", "b", "c"]):
        assert cli.main(words) == 2
    for words, message in (
        (("nowhere", "hf:x"), "SOURCE must be"),
        ((f"hf:{tmp_path}/gpt2", "x.bin"), "TARGET must be"),
    ):
        assert cli.main(["convert", *words]) == 1 and message in capsys.readouterr().err


def test_lora_is_the_low_rank_branch_and_trains_nothing_else():
    """Against x W^T + (alpha / rank) (x down^T) up^T in float64, and its own function before any step."""
    base = shaken(GPT(CONFIG)).double()
    idx, targets = torch.arange(24)[None], torch.arange(1, 25)[None]
    before = base(idx)[0]
    model = FastGPT.from_reference(base, backend="reference")
    add_lora(model, LoraConfig(rank=3, alpha=6.0))
    assert torch.equal(model(idx)[0], before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2 and all("parametrizations.weight.0." in name for name in trained)
    config = resolve("tiny", ["rank=3", "init=hf:x"])[0]
    groups = make_optimizer(model, config).param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    linear = model.transformer.h[1].mlp.c_fc
    low = linear.parametrizations.weight[0]
    with torch.no_grad():
        low.up.normal_()
    x = torch.randn(5, 32, dtype=torch.float64)
    expected = x @ linear.parametrizations.weight.original.T + 2.0 * (x @ low.down.T) @ low.up.T + linear.bias
    torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)
    model(idx, targets)[1].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    there = model(idx)[0]
    merge_lora(model)
    assert model.state_dict().keys() == GPT(CONFIG).state_dict().keys() and torch.equal(model(idx)[0], there)


def test_a_sum_of_lora_is_rounded_by_the_operators_alone():
    model = GPT(CONFIG)
    add_lora(model, LoraConfig(rank=3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.float32


def test_what_stands_in_for_a_sharded_model_has_its_parts():
    """It is made on the meta device, where a sum cannot be tried out."""
    config = Config(CONFIG, TrainConfig(init="weights.safetensors"), LoraConfig(rank=3))
    model = FastGPT(CONFIG)
    add_lora(model, config.lora)
    other = stand_in(model, config, torch.device("cpu"), accumulates=False)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    found = {name: p.shape for name, p in other.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert found == shapes
    other(torch.zeros((1, 4), dtype=torch.int64), torch.zeros((1, 4), dtype=torch.int64))[1].backward()


def test_a_run_with_lora_resumes_and_is_merged(tokens, tmp_path):
    write_folder(tmp_path / "gpt2", shaken(GPT(CONFIG)), None)
    common = [
        f"data={tokens}",
        f"init=hf:{tmp_path / 'gpt2'}",
        f"out={tmp_path}",
        "context=16",
        "batch=2",
        "lora.rank=2",
    ]
    # A rate that does not depend on the number of steps, so that a run of fewer is the beginning of one of more.
    common += ["dropout=0.1", "eval_every=2", "sample_tokens=4", "warmup=0", "min_lr=1e-3", "lr=1e-3", "--quiet"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert cli.main(["train", "steps=6", "name=straight", *common]) == 0
    assert cli.main(["train", "steps=4", "name=stopped", *common]) == 0
    assert cli.main(["train", "--resume", str(stopped), "steps=6", "--quiet"]) == 0
    assert_same_run(straight, stopped)
    state = load(straight, LAST)["model"]
    frozen = load_weights(tmp_path / "gpt2", ["context=16"])[0]
    name = "transformer.h.0.attn.c_attn"
    original, down, up = (state[f"{name}.parametrizations.weight.{part}"] for part in ("original", "0.down", "0.up"))
    assert torch.equal(original, frozen.get_parameter(f"{name}.weight"))
    merged, _, config = load_model(straight, LAST)
    assert merged.state_dict().keys() == frozen.state_dict().keys()
    expected = original.double() + config.lora.alpha / 2 * up.double() @ down.double()
    assert up.abs().max() > 0
    error = (merged.get_parameter(f"{name}.weight").double() - expected).abs().max()
    assert (
        error <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()
    )  # of two products, their sum and its scale
