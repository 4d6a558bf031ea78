"""The transformers integration: many architectures keep their loss and gradients without computing the logits."""

import pickle
import threading

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers.loss import loss_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastrlhf
from _support.patched import assert_no_worse
from fastrlhf.errors import UserError
from fastrlhf.integrations import PatchError, _transformers_check
from fastrlhf.integrations import transformers as integration
from fastrlhf.integrations._lazy_logits import LazyLogits
from fastrlhf.ops import _backend

LOSS = "transformers.loss.loss_utils.ForCausalLMLoss"
CALL = "transformers.modeling_utils.PreTrainedModel.__call__"
SMALL = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GPT = {"vocab_size": 67, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
# Class and configuration. The models differ in what their forward does between the head and the loss.
ZOO = {
    "llama": ("LlamaForCausalLM", SMALL),
    "llama tied": ("LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", SMALL),
    "gemma2 soft-cap": ("Gemma2ForCausalLM", {**SMALL, "final_logit_softcapping": 3.0}),
    "cohere scale": ("CohereForCausalLM", {**SMALL, "logit_scale": 0.25}),
    "granite divides": ("GraniteForCausalLM", {**SMALL, "logits_scaling": 4.0}),
    "mixtral aux loss": (
        "MixtralForCausalLM",
        {**SMALL, "num_local_experts": 4, "output_router_logits": True},
    ),
    "phi bias": ("PhiForCausalLM", {k: v for k, v in SMALL.items() if k != "head_dim"}),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt-j bias": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 67, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2},
    ),
    "t5 own loss": (
        "T5ForConditionalGeneration",
        {"vocab_size": 67, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
         "decoder_start_token_id": 0, "pad_token_id": 0},
    ),
}  # fmt: skip
OWN_LOSS = {"t5 own loss"}


@pytest.fixture(autouse=True)
def clean():
    yield
    integration.unpatch()


def build(name, seed=0, **changes):
    kind, sizes = ZOO[name]
    torch.manual_seed(seed)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**{**sizes, **changes}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # large logits, so that a soft-cap matters
    return model.eval()  # no dropout; gradients stay enabled


def batch(model, seed=1, shape=(3, 9)):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.config.vocab_size, shape, generator=generator)
    labels = ids.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)
    return {"input_ids": ids, "labels": labels}


def step(model, inputs):
    """[loss, the gradients of all parameters as one vector] of one training step.

    One vector, because the gradient of a key bias is rounding error alone.
    """
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), flat_gradient(model)]


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(40)}])
def test_every_architecture_keeps_its_loss(name, options):
    model = build(name)
    if name in OWN_LOSS and options:
        pytest.skip("takes no num_items_in_batch")
    inputs = {**batch(model, shape=(8, 33)), **options}
    theirs = step(model, inputs)
    exact = build(name).double()
    # transformers computes the loss in fp32 for every model, so the truth is computed from its fp64 logits.
    truth = step_in_fp64(exact, inputs) if name not in OWN_LOSS | {"mixtral aux loss"} else None
    before = _backend.calls.copy()
    with integration.patch(self_check=False) as patched:
        ours = step(model, inputs)
    fused = (_backend.calls - before)[
        "linear_cross_entropy", _backend.auto("linear_cross_entropy", "cpu")
    ]
    assert fused == (0 if name in OWN_LOSS else 1)
    assert patched.calls[CALL] == 1
    assert patched.fallbacks == {}
    if truth is None:
        for mine, original in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, original, rtol=2e-5, atol=2e-6)
    else:
        assert_no_worse(ours, theirs, truth)


def step_in_fp64(model, inputs):
    model.zero_grad()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    count = inputs.get("num_items_in_batch", (inputs["labels"][:, 1:] != -100).sum())
    targets = inputs["labels"][:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / count
    loss.backward()
    return [loss.detach(), flat_gradient(model)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype):
    model = build("gemma2 soft-cap").to(dtype)
    inputs = batch(model, shape=(8, 33))
    theirs = step(model, inputs)
    truth = step_in_fp64(build("gemma2 soft-cap").to(dtype).double(), inputs)
    with integration.patch():
        ours = step(model, inputs)
    assert_no_worse(ours, theirs, truth)


def test_under_autocast():
    model = build("llama")
    inputs = batch(model, shape=(8, 33))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model, inputs)
        with integration.patch():
            ours = step(model, inputs)
            out = model(**inputs)
    assert out.logits.dtype == torch.bfloat16
    assert out.logits.tensor().dtype == torch.bfloat16  # also when it is read outside autocast
    assert_no_worse(ours, theirs, step_in_fp64(build("llama").double(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 40}, {"ignore_index": -1}])
@pytest.mark.parametrize("shifted", [False, True])
def test_loss_from_logits(dtype, options, shifted):
    torch.manual_seed(0)
    logits = (4 * torch.randn(4, 33, 67)).to(dtype)
    labels = torch.randint(0, 67, (4, 33))
    labels[torch.rand(4, 33) < 0.3] = options.get("ignore_index", -100)
    targets = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}

    def run(x):
        x = x.detach().clone().requires_grad_()
        loss = loss_utils.ForCausalLMLoss(x, vocab_size=67, **targets, **options)
        loss.backward()
        return [loss.detach(), x.grad]

    def exact(x):
        x = x.detach().clone().requires_grad_()
        z, y = (x, labels) if shifted else (x[:, :-1], labels[:, 1:])
        ignored = options.get("ignore_index", -100)
        loss = nn.functional.cross_entropy(
            z.flatten(0, 1), y.flatten(), ignore_index=ignored, reduction="sum"
        )
        loss = loss / options.get("num_items_in_batch", (y != ignored).sum())
        loss.backward()
        return [loss.detach(), x.grad]

    theirs = run(logits)
    with integration.patch() as patched:
        ours = run(logits)
    assert patched.calls[LOSS] == 1
    assert_no_worse(ours, theirs, exact(logits.double()))


@pytest.mark.parametrize("from_hidden", [False, True])
def test_a_batch_without_targets(from_hidden):
    model = build("llama")
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.full((2, 5), -100)}
    theirs = step(model, inputs)
    with integration.patch():
        if not from_hidden:
            model.lm_head.register_forward_hook(lambda *_: None)
        ours = step(model, inputs)
    for mine, original in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, original, equal_nan=True)


# ---- lazy logits ----


def test_logits_are_computed_when_they_are_read():
    model = build("gemma2 soft-cap")
    inputs = batch(model)
    expected = model(**inputs).logits
    with integration.patch():
        out = model(**inputs)
        assert isinstance(out.logits, LazyLogits)
        assert out.logits.shape == expected.shape
        assert (out.logits.dtype, out.logits.device) == (expected.dtype, expected.device)
        assert torch.equal(out.logits.argmax(-1), expected.argmax(-1))
        assert torch.equal(torch.softmax(out.logits, -1), expected.softmax(-1))
        assert torch.equal(out.logits[:, -1] + 1, expected[:, -1] + 1)
        assert torch.equal(out.logits % 2, expected % 2)
        assert torch.equal(out.logits // 2, expected // 2)
        saved = pickle.dumps(model(**inputs).logits)  # logits that were not read before
        assert b"fastrlhf" not in saved and torch.equal(pickle.loads(saved), expected)
        out.logits.sum().backward()  # with their autograd graph
        ours = model.lm_head.weight.grad.clone()
        model.zero_grad()
        expected.sum().backward()
        torch.testing.assert_close(ours, model.lm_head.weight.grad)


CHAINS = {
    "nothing": lambda x: x,
    "scale": lambda x: 0.25 * (x / 3.0),
    "soft-cap": lambda x: torch.tanh(x / 5.0) * 5.0,
    "scale in and out of a tanh": lambda x: 2.0 * (x * 0.3).float().tanh() / 0.7,
    "dtypes": lambda x: x.to(torch.float32).float().contiguous().to("cpu"),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_recorded_operations_give_the_same_logits(chain):
    torch.manual_seed(0)
    head = nn.Linear(8, 31)
    hidden = torch.randn(5, 8)
    lazy = CHAINS[chain](LazyLogits(head.forward, hidden, head.weight, head.bias))
    assert isinstance(lazy, LazyLogits)
    x, weight, bias, temperature, softcap = lazy.linear_loss_inputs()
    z = x @ weight.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = CHAINS[chain](head(hidden))
    torch.testing.assert_close(z / temperature, expected)
    assert torch.equal(lazy.tensor(), expected)
    assert lazy.linear_loss_inputs() is None  # the tensor may be written to from now on


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * torch.tensor(2.0),
        lambda x: x * -1.0,
        lambda x: x.tanh().tanh(),
        lambda x: x / 0.0,
        lambda x: x + 1,
        lambda x: 1 / x,
        lambda x: x[..., :4],
        lambda x: x.view(-1),
        lambda x: torch.cat([x, x]),
        lambda x: x.to(torch.int64),
        lambda x: nn.functional.pad(x, (0, 1)),
    ],
)
def test_other_operations_compute_the_logits(step):
    torch.manual_seed(0)
    head = nn.Linear(8, 31)
    hidden = torch.randn(5, 8)
    out = step(LazyLogits(head.forward, hidden, head.weight, head.bias))
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, step(head(hidden)))


def test_a_model_that_writes_into_its_logits_keeps_its_loss(monkeypatch):
    """Some models mask tokens in place: the loss must see the modified logits."""
    model = build("llama")
    inputs = batch(model)

    class Masked(nn.Module):
        def forward(self, **kwargs):
            kwargs = dict(kwargs)
            labels = kwargs.pop("labels")
            logits = model.lm_head(model.model(**kwargs)[0])
            logits[..., 5] = -1e4
            loss = model.loss_function(logits=logits, labels=labels, vocab_size=67)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    monkeypatch.setattr(type(model), "forward", lambda self, **kwargs: Masked().forward(**kwargs))
    inputs["labels"][inputs["labels"] == 5] = -100
    theirs = step(model, inputs)
    with integration.patch() as patched:
        ours = step(model, inputs)
    assert patched.calls[CALL] == 1
    for mine, original in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, original, rtol=2e-5, atol=2e-6)


def test_reading_logits_after_an_optimizer_step_is_an_error():
    model = build("llama")
    with integration.patch():
        out = model(**batch(model))
        out.loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with pytest.raises(RuntimeError, match="weight has changed since"):
            out.logits.argmax(-1)


def test_evaluation_computes_the_logits():
    model = build("llama")
    inputs = batch(model)
    expected = model(**inputs)
    with integration.patch() as patched, torch.no_grad():
        out = model(**inputs)
    assert torch.equal(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    assert patched.calls == {LOSS: 1}
    assert patched.fallbacks == {}


class Adapter(nn.Linear):
    """Like a LoRA layer around the head."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


def adapt(model):
    adapter = Adapter(16, 67, bias=False)
    adapter.weight = model.lm_head.weight
    model.lm_head = adapter


def replace_forward(model):
    real = model.lm_head.forward
    model.lm_head.forward = lambda x: real(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapt, "Adapter, not a plain torch.nn.Linear"),
        (replace_forward, "forward is replaced"),
        (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "has hooks"),
    ],
)
def test_other_heads_keep_their_logits(change, reason, caplog):
    model = build("llama")
    change(model)
    inputs = batch(model)
    theirs = step(model, inputs)
    with integration.patch() as patched:
        ours = step(model, inputs)
        step(model, inputs)
        assert isinstance(model(**inputs).logits, torch.Tensor)
    assert patched.calls == {LOSS: 3}
    ((name, logged),) = patched.fallbacks
    assert (name, patched.fallbacks[name, logged]) == (CALL, 3)
    assert reason in logged
    assert sum(reason in r.getMessage() for r in caplog.records) == 1
    for mine, original in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, original, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("layers", "fused"), [(["q_proj"], 1), (["q_proj", "lm_head"], 0)])
def test_lora(layers, fused):
    """LoRA below the head is served; LoRA on the head keeps its logits."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=layers, r=2))
    inputs = batch(model)
    theirs = step(model, inputs)
    with integration.patch() as patched:
        ours = step(model, inputs)
    assert patched.calls.get(CALL, 0) == fused
    assert len(patched.fallbacks) == 1 - fused
    for mine, original in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, original, rtol=2e-5, atol=2e-6)


def test_another_thread_gets_tensors_from_the_same_head():
    model = build("llama")
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    failures, stop = [], threading.Event()

    def evaluate():
        while not stop.is_set():
            with torch.no_grad():
                logits = model(**inputs).logits
            if not isinstance(logits, torch.Tensor) or not torch.equal(logits, expected):
                failures.append(type(logits))

    with integration.patch():
        thread = threading.Thread(target=evaluate)
        thread.start()
        for _ in range(100):
            model(**inputs)
        stop.set()
        thread.join()
    assert failures == []
    assert "forward" not in vars(model.lm_head)


def test_everything_is_restored():
    forward = transformers.PreTrainedModel
    before = (loss_utils.ForCausalLMLoss, dict(loss_utils.LOSS_MAPPING))
    assert "__call__" not in vars(forward)
    with integration.patch():
        assert loss_utils.LOSS_MAPPING["ForCausalLM"] is loss_utils.ForCausalLMLoss is not before[0]
        assert loss_utils.LOSS_MAPPING["ForConditionalGeneration"] is loss_utils.ForCausalLMLoss
        assert "__call__" in vars(forward)
        with integration.patch():
            pass
        assert "fastrlhf_varlen" in ALL_MASK_ATTENTION_FUNCTIONS
        assert "fastrlhf_varlen" in ALL_ATTENTION_FUNCTIONS
    assert loss_utils.ForCausalLMLoss is before[0]
    assert loss_utils.LOSS_MAPPING == before[1]
    assert "__call__" not in vars(forward)


def test_compiled_models_keep_their_loss():
    model = build("llama")
    inputs = batch(model)
    theirs = step(model, inputs)
    with integration.patch():
        ours = step(torch.compile(model, backend="eager"), inputs)
    for mine, original in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, original, rtol=2e-5, atol=2e-6)


def test_a_missing_function_is_named(monkeypatch):
    monkeypatch.delattr(loss_utils, "ForCausalLMLoss")
    with pytest.raises(PatchError, match="has no transformers.loss.loss_utils.ForCausalLMLoss"):
        integration.patch()


# ---- other ways to call a model ----


def test_labels_passed_by_position():
    model = build("llama")
    inputs = batch(model)
    expected = step(model, inputs)
    with integration.patch() as patched:
        model.zero_grad()
        loss = model(inputs["input_ids"], None, None, None, None, inputs["labels"]).loss
        loss.backward()
    assert patched.calls[CALL] == 1
    torch.testing.assert_close([loss.detach(), flat_gradient(model)], expected)


def test_global_module_hooks_see_the_logits():
    model = build("llama")
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(type(out)) if module is model.lm_head else None
    )
    try:
        with integration.patch():
            step(model, batch(model))
    finally:
        hook.remove()
    assert seen == [torch.Tensor]


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_compiled_in_place_is_compiled_once(whole):
    model, counter = build("llama"), CompileCounter()
    torch._dynamo.reset()
    if whole:
        model.compile(backend=counter)
    else:
        model.forward = torch.compile(model.forward, backend=counter)
    with integration.patch() as patched:
        for _ in range(3):
            step(model, batch(model))
    torch._dynamo.reset()
    assert counter.frame_count == 1
    assert patched.fallbacks == {(CALL, "torch.compile traces the model"): 3}


# ---- the self-check ----


def test_self_check_is_a_bool():
    with pytest.raises(TypeError, match="self_check must be a bool; got str"):
        integration.patch(self_check="off")


@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr(_transformers_check, "_failures", {})
    return _transformers_check._failures


def test_each_class_and_config_is_measured_once(unmeasured, caplog):
    with integration.patch() as patched:
        for name in [*ZOO, "llama"]:
            step(build(name), batch(build(name)))
    measured = sorted({kind.__name__ for kind, *_ in unmeasured})
    assert measured == sorted({kind for kind, _ in ZOO.values()})
    assert set(unmeasured.values()) == {None}
    (said,) = (r.getMessage() for r in caplog.records if "no self-check" in r.getMessage())
    assert said.startswith("T5ForConditionalGeneration: ")  # needs an input of its decoder
    assert patched.calls[CALL] == len(ZOO) + 1  # those of the check are not counted


def test_a_wrong_loss_is_refused(unmeasured, monkeypatch):
    """The soft-cap is dropped, as a replacement that does not know it would do."""
    original = fastrlhf.linear_cross_entropy

    def without_softcap(*args, softcap=None, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(fastrlhf, "linear_cross_entropy", without_softcap)
    model = build("gemma2 soft-cap")
    for _ in range(2):
        with (
            integration.patch(),
            pytest.raises(UserError, match=r"fails the self-check.*loss differs.*self_check=False"),
        ):
            model(**batch(model))
    with integration.patch(self_check=False):
        model(**batch(model))
    assert len(unmeasured) == 1


class Recurrent(transformers.LlamaForCausalLM):
    """A state runs along the row, so packed rows mix."""

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda _, args, out: out + 0.1 * out.cumsum(1))


@pytest.mark.parametrize("kind", [Recurrent, transformers.LlamaForCausalLM])
def test_packed_attention_is_measured_at_the_first_call(kind, unmeasured):
    with integration.patch():
        model = kind._from_config(
            transformers.LlamaConfig(**SMALL), attn_implementation="fastrlhf_varlen"
        )
        if kind is Recurrent:
            with pytest.raises(UserError, match="packed rows differ .* got"):
                model(input_ids=torch.tensor([[5, 6, 7]]))
        else:
            model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(unmeasured) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_classifier_is_measured_if_it_runs_packed(packed, unmeasured):
    starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    lengths = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": 2,
        "max_length_k": 2,
    }
    with integration.patch():
        model = transformers.LlamaForSequenceClassification._from_config(
            transformers.LlamaConfig(**SMALL), attn_implementation="fastrlhf_varlen"
        )
        ids = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
        model(**ids, position_ids=torch.tensor([[0, 1, 0]]), **(lengths if packed else {}))
    assert len(unmeasured) == packed
