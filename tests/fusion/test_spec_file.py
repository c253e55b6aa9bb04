"""Bad specs are told with file, line, column and a suggestion."""

from __future__ import annotations

import pytest
import zmq

from fusion.errors import DataError, SpecError
from fusion.sockets import keep_alive
from fusion.spec_file import load_spec, placed, spec_from

GOOD = """\
name: small
model: {entrypoint: model.py:build, args: {rate: 1e-3}}
loss: mse
data: {arrays: data.npz}
train:
  steps: 10
  global_batch: 8
  micro_batch: 2
  optimizer: {name: adamw, lr: 3.0e-4}
fault_tolerance: {failure_timeout: 500ms}
"""


def problem(tmp_path, text: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    return str(caught.value).replace(str(path), "job.yaml")


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_spec(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD)
    spec = load_spec(path)
    assert spec.train.micro_batches == 4
    assert spec.fault_tolerance.failure_timeout == 0.5
    assert spec.model.args == {"rate": 0.001}, "1e-3 is a number, as in YAML 1.2"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 10", "stepps: 10", "job.yaml: 2 problems"),
        ("loss: mse", "los: mse", "job.yaml:3:1: los: unknown key 'los'; did you mean 'loss'?"),
        ("{name: adamw", "{nam: adamw", "job.yaml:9:15: train.optimizer.nam: unknown key 'nam'; did you mean 'name'?"),
        ("steps: 10", "steps: many", "job.yaml:6:3: train.steps: expected a whole number, got 'many'"),
        ("steps: 10", "steps: 0", "job.yaml:6:3: train.steps: input should be greater than 0, got 0"),
        ("steps: 10", "steps: [1]", "job.yaml:6:3: train.steps: expected a whole number, got a list"),
        ("micro_batch: 2", "micro_batch: 3", "job.yaml:5:1: train: micro_batch 3 does not divide global_batch 8"),
        ("steps: 10", f"steps: 1{'0' * 30}", "job.yaml:6:3: train.steps: input should be at most 1,000,000,000,000"),
        ("global_batch: 8", "global_batch: 800000", "400,000 micro-batches of 2 in a step; a step has 16,384 at most"),
        ("lr: 3.0e-4", "lr: .inf", "train.optimizer.lr: input should be a finite number"),
        ("lr: 3.0e-4", "betas: [0.9, 1.5]", "train.optimizer.betas[1]: input should be less than 1, got 1.5"),
        ("adamw, lr: 3.0e-4", "sgd, nesterov: true", "train.optimizer: nesterov needs a momentum above 0"),
        ("adamw", "adamm", "got 'adamm'; did you mean 'adam'?"),
        ("name: adamw,", "name: adamw, momentum: 0.9,", "train.optimizer: adamw has no option momentum"),
        ("{arrays: data.npz}", "{aray: x}", "data: needs exactly one of these keys: text, arrays, entrypoint, hf"),
        ("{arrays: data.npz}", "{text: a.txt, sequence: 5}", "job.yaml:4:21: data.sequence: unknown key 'sequence'"),
        ("{arrays: data.npz}", "{arrays: 7}", "data.arrays: expected text or a mapping of keys to values, got 7"),
        ("loss: mse", "loss: crossentropy", "'crossentropy'; did you mean 'cross_entropy'?"),
        (
            "500ms",
            "100000h",
            "job.yaml:10:19: fault_tolerance.failure_timeout: must be between 1ms and 24h, got '100000h'",
        ),
        ("500ms", "1e300", "fault_tolerance.failure_timeout: must be between 1ms and 24h, got 1e+300"),
        ("500ms", "0", "fault_tolerance.failure_timeout: must be between 1ms and 24h, got 0"),
        (
            "failure_timeout: 500ms",
            "log_memory: 1e290TiB",
            "fault_tolerance.log_memory: must be between 1B and 1000TiB",
        ),
        *(
            (
                "failure_timeout: 500ms",
                f"backup_every: {given}",
                "job.yaml:10:19: fault_tolerance.backup_every: expected 'auto' or a whole number of 1 or more, got "
                + shown,
            )
            for given, shown in (("0", "0"), ("-3", "-3"), ("2.5", "2.5"), ("often", "'often'"), ("[1]", "a list"))
        ),
        ("500ms", "5 parsec", "can't read '5 parsec' as a duration; write it like 90ms"),
        (
            "name: small",
            "name: small\nverify: {fraction: 1.5}",
            "job.yaml:2:10: verify.fraction: input should be less than or equal to 1, got 1.5",
        ),
        (
            "name: small",
            "name: small\ncompression: {codec: int8, backward: topk-reused}",
            "job.yaml:2:1: compression: backward topk-reused needs a top-k codec of the activations, not int8",
        ),
        ("name: small", "name: small\ncompression: {codec: topk, forward: int4, backward: topk-reused}", "not int4"),
        (
            "name: small",
            "name: small\ncompression: {codec: topk, backward: 'topk-reused:ratio=3'}",
            "leave its own out",
        ),
        ("name: small", "name: small\ncompression: {forward: topk-reused}", "compression.forward: "),
        (
            "name: small",
            "name: small\ncompression: {forward: topk-reused}",
            "job.yaml:2:15: compression.forward: topk-reused is a codec of gradients (backward) only; known: none, bf16",
        ),
        (
            "name: small",
            "name: small\ncompression: {forward: INT4}",
            "job.yaml:2:15: compression.forward: unknown codec 'INT4'; did you mean 'int4'? Known: none, bf16, int8, int4",
        ),
        (
            "name: small",
            "name: small\ncompression: {codec: topk, backward: zip}",
            "job.yaml:2:28: compression.backward: unknown codec 'zip'; known: none, bf16",
        ),
        (
            "name: small",
            "name: small\ncompression: {forward: auto}",
            "compression.forward: auto chooses a codec for each link and is no codec itself; write `codec: auto`",
        ),
        (
            "name: small",
            "name: small\ncompression: {forward: 'topk:ratio=0.5'}",
            "compression.forward: option ratio of codec topk must be 1 or more and finite, not 0.5",
        ),
        (
            "name: small",
            "name: small\ncompression: {backward: 'int4:block=7'}",
            "compression.backward: option block of codec int4 must be a multiple of 8 in 8..65536, not 7",
        ),
        ("name: small", "name: small\ncompression: {forward: 'topk:ratio=1.2.3'}", "must be a number, not '1.2.3'"),
        ("name: small", "name: small\ncompression: {forward: 7}", "compression.forward: expected text, got 7"),
        (
            "name: small",
            "name: small\ncompression: {codec: topk, ratio: .inf}",
            "job.yaml:2:28: compression.ratio: input should be a finite number, got inf",
        ),
        ("name: small", "name: small\ncompression: {codec: adatopk, ratio: 1e308}", "compression.ratio: "),
        ("name: small", "name: small\nverify: {fraction: -0.1}", "verify.fraction: "),
        ("name: small", "name: small\nverify: {fraction: .nan}", "verify.fraction: "),
        ("name: small", "name: small\nverify: {share: 0.1}", "unknown key 'share'"),
        ("name: small", "name: small\nname: other", "job.yaml:2:1: key 'name' stands here again (first in line 1)"),
        ("name: small", "name: 'a b'", "job.yaml:1:1: name: "),
        *(
            ("name: small", f"name: {given}", f"job.yaml:1:7: not valid YAML: can't read {shown}")
            for given, shown in (
                ('!!bool "abc"', "'abc' as true or false"),
                ('!!int "abc"', "'abc' as a whole number"),
                ('!!float ""', "'' as a number"),
                ('!!timestamp "abc"', "'abc' as a date"),
                ("2024-13-45", "'2024-13-45' as a date; put it in quotes if it is text"),
                (5000 * "9", "'9999"),
                ("0x" + 5000 * "f", "'0xffff"),
            )
        ),
        ("loss: mse", "loss: mse\nnull: 3", "job.yaml:4:1: null: a key must be text; put it in quotes"),
        ("loss: mse", "loss: mse\ntrue: 3", "job.yaml:4:1: true: a key must be text; put it in quotes"),
        ("steps: 10", "steps: 10\n  no: 3", "job.yaml:7:3: train.no: a key must be text; put it in quotes"),
        ("rate: 1e-3", "rate: 1, 0x10: 2", "job.yaml:2:53: model.args.0x10: a key must be text; put it in quotes"),
        ("{arrays: data.npz}", "{arrays: {inputs: 5}}", "job.yaml:4:17: data.arrays.inputs: expected text, got 5"),
        ("steps: 10", "steps: true", "job.yaml:6:3: train.steps: expected a whole number, got true"),
        ("lr: 3.0e-4", "lr: true", "train.optimizer.lr: expected a number, got true"),
        ("lr: 3.0e-4", "betas: [0.9, yes]", "train.optimizer.betas[1]: expected a number, got true"),
        ("name: small", "plan: {fragments: true}", "plan.fragments: expected a whole number, got true"),
        ("500ms", "true", "fault_tolerance.failure_timeout: a duration must be a number or text such as 90ms"),
        ("failure_timeout: 500ms", "backup_every: true", "expected 'auto' or a whole number of 1 or more, got true"),
        ("  global_batch: 8\n", "", "train.global_batch: missing; add it (Samples per step)"),
        ("train:\n", "train: [\n", "not valid YAML"),
        ("train:\n", "train: !!python/object:os.system\n", "not valid YAML"),
    ],
)
def test_problems(tmp_path, old, new, message):
    assert message in problem(tmp_path, changed(old, new))


def test_true_and_false_stay_what_they_are_where_they_are_wanted(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        changed("args: {rate: 1e-3}", "args: {bias: true}").replace("steps: 10", "steps: 10\n  recompute: yes")
    )
    spec = load_spec(path)
    assert spec.model.args == {"bias": True}
    assert spec.train.recompute is True


def test_several_problems_are_all_listed_in_the_order_of_the_file(tmp_path):
    text = changed("steps: 10", "stepps: 10").replace("loss: mse", "loss: none")
    lines = problem(tmp_path, text).splitlines()
    assert lines[0] == "job.yaml: 3 problems"
    assert [line.split(":")[1] for line in lines[1:]] == ["3", "5", "6"]


@pytest.mark.parametrize("given", ["1ms", "24h"])
def test_the_longest_silence_is_one_that_a_socket_can_wait_for(tmp_path, given):
    path = tmp_path / "job.yaml"
    path.write_text(changed("500ms", given))
    socket = zmq.Context.instance().socket(zmq.DEALER)
    try:
        keep_alive(socket, load_spec(path).fault_tolerance.failure_timeout)
    finally:
        socket.close(0)


@pytest.mark.parametrize(("text", "message"), [("", "holds nothing"), ("- 1", "holds a list"), ("hello", "holds text")])
def test_not_a_mapping(tmp_path, text, message):
    assert message in problem(tmp_path, text)


def test_unreadable(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="is a folder"):
        load_spec(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="can't read"):
        load_spec(tmp_path / "binary.yaml")


def test_deep_nesting_is_refused_in_one_line(tmp_path):
    assert "\n" not in problem(tmp_path, "a: " + "[" * 20000)


def test_a_control_character_is_named_with_its_place(tmp_path):
    (tmp_path / "job.yaml").write_text("name: x\nmodel: a\x7fb\n")
    with pytest.raises(SpecError, match=r"job\.yaml:2:9: not valid YAML: a control character \('\\x7f'\)"):
        load_spec(tmp_path / "job.yaml")


def test_from_data():
    data = {"model": {"hf": "gpt2"}, "data": {"text": "a.txt"}, "train": {"steps": 1, "global_batch": 2}}
    assert spec_from(data).train.micro_batch_size == 2
    with pytest.raises(SpecError, match=r"^job spec: train\.step: unknown key 'step'; did you mean 'steps'\?"):
        spec_from({**data, "train": {"steps": 1, "global_batch": 2, "step": 1}})


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("model.entrypoint: no such file", "job.yaml:2:9: "),
        ("data.arrays /x/data.npz: no such file", "job.yaml:4:8: "),
        ("loss mse: takes one tensor", "job.yaml:3:1: "),
        ("train.eval_every: nothing is held out", "job.yaml:5:1: "),
        ("compression.codec: not here", ""),
        ("model.py:3: ValueError: mine", ""),
        ("nothing of the kind", ""),
    ],
    ids=["key", "key and value", "section", "default in a section", "section not in the file", "code", "no key"],
)
def test_what_is_found_later_is_placed_by_the_key_it_begins_with(tmp_path, said, place):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD)
    with pytest.raises(DataError) as caught, placed(path):
        raise DataError(said)
    assert str(caught.value).replace(str(path), "job.yaml") == place + said


def test_a_spec_that_is_gone_takes_no_error_with_it(tmp_path):
    path = tmp_path / "job.yaml"
    with pytest.raises(DataError, match=r"^data\.text: no such file$"), placed(path):
        raise DataError("data.text: no such file")
