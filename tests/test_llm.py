"""The offline API as its users meet it: shapes of input and output, errors, interruption, chat."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from kvik import (
    LLM,
    CapacityError,
    ConfigError,
    EngineConfig,
    LLMEngine,
    ModelLoadError,
    RequestError,
    SamplingParams,
    WorkerError,
)

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), max_model_len=256) as made:
        yield made


def idle(llm: LLM) -> bool:
    """Whether nothing of any request is left."""
    scheduler = llm.llm_engine.engine.scheduler
    scheduler.check_invariants()
    llm.llm_engine.step()
    return not llm.llm_engine.has_unfinished() and scheduler.kv.num_used == 0 and not llm._mailboxes


def test_prompts_of_every_shape(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello world")
    expected = llm.generate(["hello world"], GREEDY)[0]
    assert expected.prompt == "hello world" and expected.prompt_token_ids == tuple(ids)
    assert len(expected.token_ids) == 6 and expected["text"] == expected.text and expected.finish_reason == "length"
    for prompts in ("hello world", ids, [ids], tuple(ids), torch.tensor(ids).tolist()):
        outputs = llm.generate(prompts, GREEDY)
        assert [output.token_ids for output in outputs] == [expected.token_ids]
    mixed = llm.generate(["hello world", ids, "once"], [GREEDY, GREEDY, SamplingParams(max_tokens=2)])
    assert [len(output.token_ids) for output in mixed] == [6, 6, 2]
    assert [output.index for output in mixed] == [0, 1, 2]
    assert llm.generate([], GREEDY) == []
    assert idle(llm)


def test_usage_and_metrics(llm: LLM) -> None:
    output = llm.generate("metrics of a request", SamplingParams(max_tokens=5, n=3, seed=1, ignore_eos=True))[0]
    assert output.usage.completion_tokens == 15
    assert output.usage.total_tokens == len(output.prompt_token_ids) + 15
    metrics = output.metrics
    assert metrics.queue_time is not None and metrics.time_to_first_token is not None
    assert 0 <= metrics.queue_time <= metrics.time_to_first_token <= metrics.total_time
    assert metrics.time_per_output_token is not None and metrics.time_per_output_token > 0
    before = llm.stats.num_decode_tokens
    llm.generate("again", SamplingParams(max_tokens=4, ignore_eos=True))
    assert llm.stats.num_decode_tokens == before + 3  # the first token comes from the prefill
    assert llm.stats.last is not None and llm.stats.last.total_time > 0


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], GREEDY, "no tokens"),
        ([5, -1], GREEDY, "outside the vocabulary"),
        ([5, 10**6], GREEDY, "outside the vocabulary"),
        ([5, 2.5], GREEDY, "token ids"),
        (None, GREEDY, "token ids"),
        ({"prompt_token_ids": [5, 6]}, GREEDY, "not {'prompt_token_ids'"),
        (b"abc", GREEDY, "not b'abc'"),
        ([5], {"max_tokens": 2}, "must be SamplingParams"),
        ([5] * 300, GREEDY, "300 tokens"),
        ([5] * 256, GREEDY, "256"),
        ([5] * 200, SamplingParams(max_tokens=57), "257"),
        ([5], SamplingParams(logit_bias={384: 1.0}), "logit_bias"),
        ([5], SamplingParams(stop_token_ids=[999]), "stop_token_ids"),
        ([5], SamplingParams(allowed_token_ids=[1, 999]), "allowed_token_ids"),
        ("lone surrogate \ud800", GREEDY, "surrogate"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(
    llm: LLM, prompt: Any, params: SamplingParams, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        llm.generate([prompt], params)
    assert caught.value.param is not None
    if not isinstance(prompt, (str, list)):
        with pytest.raises(RequestError, match=re.escape(words)):
            llm.generate(prompt, params)
    with pytest.raises(RequestError, match="prompt 1"):
        llm.generate([[1, 2, 3], prompt], [GREEDY, params])
    assert idle(llm)


def test_max_tokens_none_fills_the_context(llm: LLM) -> None:
    output = llm.generate([[7] * 250], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(output.token_ids) == 6 and output.finish_reason == "length"


@pytest.mark.parametrize("prompt", [torch.tensor(5), torch.tensor([5, 6]), [torch.tensor(5)]], ids=str)
def test_tensors_are_no_prompts(llm: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError, match=r"not tensor\(5\)"):
        llm.generate(prompt, GREEDY)


def test_counts_that_do_not_match(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="must be SamplingParams, or a list of them, got 5"):
        llm.generate(["a"], 5)  # type: ignore[arg-type]
    for nothing in ({}, [{}], [0]):
        with pytest.raises(RequestError, match="must be SamplingParams, got"):
            llm.generate(["a"], nothing)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="priority must be a list of integers, one for each prompt, got 5"):
        llm.generate(["a"], GREEDY, priority=5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="1 priorities for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, priority=[1])
    assert idle(llm)


def test_stop_strings_and_stop_tokens(llm: LLM) -> None:
    plain = llm.generate("stop here", SamplingParams(max_tokens=40, seed=3, ignore_eos=True))[0]
    stop = plain.text[10:13]
    cut = llm.generate("stop here", SamplingParams(max_tokens=40, seed=3, ignore_eos=True, stop=stop))[0]
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert cut.finish_reason == "stop" and cut.stop_reason == stop
    kept = llm.generate(
        "stop here",
        SamplingParams(max_tokens=40, seed=3, ignore_eos=True, stop=stop, include_stop_str_in_output=True),
    )[0]
    assert kept.text == cut.text + stop
    token = plain.token_ids[4]
    by_token = llm.generate(
        "stop here", SamplingParams(max_tokens=40, seed=3, ignore_eos=True, stop_token_ids=[token])
    )[0]
    assert by_token.token_ids[-1] == token and by_token.stop_reason == token
    assert idle(llm)


def test_a_closed_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(["one", "two"], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert idle(llm)
    llm.stream("never begun", SamplingParams(max_tokens=100, ignore_eos=True)).close()
    assert idle(llm)


def test_an_interrupt_among_the_prompts_queues_none(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, calls = llm.llm_engine.submit, [0]

    def failing(*args: Any, **options: Any) -> None:
        submit(*args, **options)
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine, "submit", failing)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b", "c"], GREEDY)
    assert idle(llm)


def test_calls_may_interleave(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    alone = llm.generate("the outer one", params)[0]
    pieces = []
    for output in llm.stream("the outer one", params):
        pieces.append(output.delta)
        if len(pieces) == 3:
            assert len(llm.generate("an inner one", GREEDY)[0].token_ids) == 6
    assert "".join(pieces) == alone.text
    assert idle(llm)


def test_calls_from_several_threads_take_turns(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    texts = [f"of thread {i}" for i in range(6)]
    alone = [output.text for output in llm.generate(texts, params)]

    def call(text: str) -> str:
        return "".join(output.delta for output in llm.stream(text, params)) + llm.generate(text, params)[0].text

    with ThreadPoolExecutor(len(texts)) as pool:
        assert list(pool.map(call, texts)) == [text * 2 for text in alone]
    assert idle(llm)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_leaves_a_usable_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    expected = llm.generate("after the storm", GREEDY)[0].token_ids
    other = llm.stream("of another call", SamplingParams(max_tokens=100, ignore_eos=True))
    next(other)
    executor = llm.llm_engine.engine.executor
    submit, calls = executor.submit, [0]

    def failing(plan: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise error("in the middle of a step")
        submit(plan)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "submit", failing)
        with pytest.raises(error):
            llm.generate(["a", "b", "c"], GREEDY)
    assert [output.finish_reason for output in other] == ["abort"]
    assert idle(llm)
    assert llm.generate("after the storm", GREEDY)[0].token_ids == expected


def test_a_failing_logits_processor_ends_only_its_request(llm: LLM) -> None:
    def bad(token_ids: list[int], logits: Any) -> Any:
        if len(token_ids) > 5:
            raise ValueError("my own mistake")
        return logits

    def only_seven(token_ids: list[int], logits: Any) -> Any:
        keep = torch.full_like(logits, -torch.inf)
        keep[7] = 0.0
        return keep

    good = llm.generate([[1, 2, 3]], GREEDY)[0]
    mine = [replace(GREEDY, logits_processors=[processor]) for processor in (bad, only_seven)]
    outputs = llm.generate([[1, 2, 3]] * 3, [GREEDY, *mine])
    assert outputs[0].token_ids == good.token_ids
    assert outputs[1].finish_reason == "error" and "my own mistake" in str(outputs[1].error)
    assert len(outputs[1].token_ids) == 3
    assert outputs[2].token_ids == (7,) * 6
    assert idle(llm)


def test_chat_renders_the_template_once(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    text, ids = llm.llm_engine.chat_template.encode(messages)
    one = llm.chat(messages, GREEDY)[0]
    assert one.prompt == text and one.prompt_token_ids == tuple(ids)
    two = llm.chat([messages, messages], GREEDY)
    assert [output.token_ids for output in two] == [one.token_ids] * 2
    streamed = "".join(output.delta for output in llm.stream_chat(messages, GREEDY))
    assert streamed == one.text
    for wrong in ([{"content": "who said this?"}], {"role": "user", "content": "alone"}, "text"):
        with pytest.raises(RequestError):
            llm.chat(wrong, GREEDY)  # type: ignore[arg-type]


def test_step_api(folder: Path) -> None:
    with LLMEngine(str(folder)) as engine:
        first = engine.add_request("hello", GREEDY)
        named = engine.add_request([1, 2, 3], GREEDY, request_id="mine")
        assert named == "mine"
        with pytest.raises(RequestError, match="in use"):
            engine.add_request("again", GREEDY, request_id="mine")
        aborted = engine.add_request("never mind", SamplingParams(max_tokens=100))
        engine.step()
        engine.abort(aborted)
        finished = engine.run_until_complete()
        assert set(finished) == {first, "mine", aborted}
        assert finished[aborted].finish_reason == "abort"
        assert engine.get_all_responses() == finished and engine.get_all_responses() == {}
        assert not engine.has_unfinished() and engine.step() == []


def test_one_output_of_a_request_a_step(folder: Path) -> None:
    """Also when a stop string ends one of its completions, which the engine learns from outside."""
    params = SamplingParams(max_tokens=40, seed=3, ignore_eos=True, n=3)
    with LLMEngine(str(folder)) as engine:
        engine.add_request("stop here", params)
        (plain,) = engine.run_until_complete().values()
        engine.add_request("stop here", replace(params, stop=(plain.outputs[1].text[10:13],)))
        steps = []
        while engine.has_unfinished():
            steps.append(engine.step())
        ended = [[choice.finish_reason for choice in outputs[0].outputs] for outputs in steps]
        assert all(len(outputs) == 1 for outputs in steps)
        assert any("stop" in reasons and None in reasons for reasons in ended)


def test_a_reset_ends_what_was_not_told(folder: Path) -> None:
    """As after an interrupt between the engine's step and the text of its outputs."""
    with LLMEngine(str(folder)) as engine:
        engine.add_request("short", SamplingParams(max_tokens=1, temperature=0.0), request_id="a")
        engine.add_request("long", SamplingParams(max_tokens=100, ignore_eos=True), request_id="b")
        while not any(output.finish_reason for output in engine.engine.step()):
            pass
        assert {output.request_id: output.finish_reason for output in engine.reset()} == {"a": "abort", "b": "abort"}
        assert not engine.has_unfinished()
        engine.add_request("again", GREEDY, request_id="a")
        assert len(engine.run_until_complete()["a"].token_ids) == 6


def test_what_a_request_is_called(folder: Path) -> None:
    with LLMEngine(str(folder)) as engine:
        assert engine.add_request("mine", GREEDY, request_id="0") == "0"
        assert engine.add_request("any", GREEDY) != "0"
        for options in ({"request_id": 1}, {"request_id": ["x"]}, {"cache_salt": 1}, {"priority": "high"}):
            with pytest.raises(RequestError, match=f"{next(iter(options))} must be"):
                engine.add_request("wrong", GREEDY, **options)
        assert len(engine.run_until_complete()) == 2


def test_options_change_a_config_by_any_of_their_names(folder: Path) -> None:
    config = EngineConfig(str(folder), kvcache_block_size=32)
    with LLMEngine(config, block_size=64, max_num_seqs=3) as engine:
        assert (engine.config.kvcache_block_size, engine.config.max_num_seqs) == (64, 3)


def test_two_engines_do_not_share_anything(folder: Path) -> None:
    with LLM(str(folder)) as one, LLM(EngineConfig(str(folder)), max_num_seqs=1) as other:
        streams = [one.stream("same", GREEDY), other.stream("same", GREEDY)]
        texts = ["".join(output.delta for output in stream) for stream in streams]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_model_len": 100_000}, ConfigError, "512"),
        ({"num_kvcache_blocks": 10**9}, CapacityError, "fit"),
        ({"kv_cache_memory": "900GiB"}, CapacityError, "fit"),
        ({"num_kvcache_blocks": 2, "block_size": 16, "max_model_len": 512}, CapacityError, "32 tokens"),
        ({"device": "cuda:99"}, ConfigError, "GPU|CUDA"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, ConfigError, "max_num_batched_tokens 4"),
        ({"block_size": 20}, ConfigError, "multiple of 16"),
        ({"kv_cache_dtype": "fp8"}, ConfigError, "auto, bfloat16, int8"),
        ({"modl": "x"}, ConfigError, "did you mean 'model'"),
        ({"trust_remote_code": True}, ConfigError, "never runs code"),
        ({"tensor_parallel_size": 2}, ConfigError, "one device"),
    ],
)
def test_options_that_cannot_be_had(folder: Path, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LLM(str(folder), **options)


def test_a_wrong_model_is_one_readable_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        LLM(str(tmp_path))


def test_automatic_context_is_what_the_pool_holds(folder: Path) -> None:
    with LLM(str(folder), num_kvcache_blocks=20, kvcache_block_size=16) as llm:
        assert llm.llm_engine.resolved.scheduler.max_model_len == 320
        assert any("lowered" in note for note in llm.llm_engine.resolved.notes)


def test_close_frees_the_weights_and_refuses_more(folder: Path) -> None:
    llm = LLM(str(folder))
    llm.close()
    llm.close()
    with pytest.raises(WorkerError, match="closed"):
        llm.generate("too late", GREEDY)


def test_a_dummy_model_needs_nothing_but_a_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with LLM(str(tmp_path), load_format="dummy") as llm:
        assert len(llm.generate([[300, 301], "text as bytes"], GREEDY)[1].token_ids) == 6
