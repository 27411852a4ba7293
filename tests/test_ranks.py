"""The ranks of torchrun before they form a group, and what one process does in their place."""

from __future__ import annotations

import re
import time
import warnings

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from segkit.commands.completion import options
from segkit.errors import InputError, Interrupted, OutOfMemory
from segkit.guard import VERB_ADVICE, explain, sentences
from segkit.training import distributed, ranks


@pytest.fixture
def second_rank(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    ranks.start_time.cache_clear()
    yield
    ranks.start_time.cache_clear()


@pytest.fixture
def agent(second_rank, monkeypatch):
    """The store that torchrun's own process keeps."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_one_process_takes_its_own_time():
    ranks.start_time.cache_clear()
    year = ranks.start_time("%Y-%m-%d")
    assert year == time.strftime("%Y-%m-%d")
    assert ranks.speaks("anything")


def test_ranks_take_the_time_of_the_first(agent, monkeypatch):
    first = ranks.start_time("%H-%M-%S")
    time.sleep(1.1)
    ranks.start_time.cache_clear()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # after a restart as well
    assert ranks.start_time("%H-%M-%S") == first


def test_one_rank_says_a_sentence_and_again_after_a_restart(agent, monkeypatch):
    assert ranks.speaks("the file is torn")
    monkeypatch.setenv("RANK", "0")
    assert not ranks.speaks("the file is torn")
    assert ranks.speaks("another file is torn")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ranks.speaks("the file is torn")


def test_ranks_without_torchrun_must_be_given_a_folder(second_rank):
    with pytest.raises(InputError, match=r"without torchrun, so they cannot agree on a run folder: set hydra.run.dir"):
        ranks.start_time("%Y")
    assert ranks.speaks("anything")
    OmegaConf.register_new_resolver("start_time", ranks.start_time, replace=True)
    node = OmegaConf.create({"folder": "${start_time:%Y}"})
    with (
        pytest.raises(InputError, match=r"^several processes were started without .*: set hydra.run.dir=DIR$"),
        sentences(),
    ):
        node.folder  # noqa: B018


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"RANK": "x"}, "invalid literal.*'x'"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE 2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR expected"),
        ({"MASTER_PORT": "99999999"}, "port must have value from 0 to 65535"),
        ({"SEGKIT_RANK_TIMEOUT_MINUTES": "long"}, "'long'"),
        ({"SEGKIT_RANK_TIMEOUT_MINUTES": "-1"}, "SEGKIT_RANK_TIMEOUT_MINUTES is -1"),
        ({"SEGKIT_RANK_TIMEOUT_MINUTES": "0.001"}, "timed out"),
    ],
)
def test_processes_that_form_no_group_are_told_how(second_rank, monkeypatch, variables, reason):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not variables.get("MASTER_ADDR", "localhost"):
        monkeypatch.delenv("MASTER_ADDR")
    with (
        pytest.raises(
            InputError, match=rf"form no group \(.*{reason}.*\): start them with torchrun.* is a number of minutes"
        ),
        distributed.process_group(torch.device("cpu")),
    ):
        pass


def test_a_sentence_is_said_where_the_store_is_gone(agent, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR")
    assert ranks.speaks("the store is gone")


def test_warnings_are_left_to_rank_0(second_rank, monkeypatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ranks.quiet_others()
        warnings.warn("once is enough", stacklevel=1)
        assert not caught
        warnings.simplefilter("always")
        monkeypatch.setenv("RANK", "0")
        ranks.quiet_others()
        warnings.warn("once is enough", stacklevel=1)
        assert len(caught) == 1


def test_a_lost_peer_is_no_defect_of_this_rank(second_rank, monkeypatch):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.1.1]:2734")
    sentence, code = explain(lost)
    assert (sentence, code) == ("another process of this run has ended; its own message says why", 1)
    assert explain(RuntimeError("shapes do not match")) == (None, 1)
    monkeypatch.delenv("RANK")
    assert explain(lost) == (None, 1)


def test_what_is_said_of_interruptions_and_memory():
    sentence, code = explain(Interrupted("stopped at step 3 of phase train"))
    assert sentence.startswith("stopped at step 3 of phase train; the state is saved: run the same command")
    assert code == Interrupted.exit_code == 75
    assert explain(OutOfMemory("out of memory at step 1")) == ("out of memory at step 1", 1)


def test_what_cannot_be_compiled_is_no_defect():
    error = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("Python.h:\n not there")
    sentence = "the model cannot be compiled (InductorError: Python.h:): set compile=false, or mend the compiler"
    assert explain(error) == explain(error, verb="check") == (sentence, 2)
    assert explain(error, verb="export") == (None, 1)


@pytest.mark.parametrize("verb", ["train", *VERB_ADVICE])
def test_out_of_memory_names_what_the_verb_takes(verb):
    sentence, code = explain(MemoryError("no memory"), verb=verb)
    assert code == 1
    assert ("grad_checkpointing" in sentence) == (verb == "train")
    if verb != "train":
        named = re.findall(r"--[a-z-]+", sentence)
        assert named
        assert set(named) <= set(options(verb))


@pytest.mark.parametrize("advice", ["set dataset.root=DIR", "the split is empty; check dataset.root and the lists"])
def test_advice_names_the_option_of_a_verb(advice):
    assert explain(InputError(advice)) == (advice, 2)
    assert explain(InputError(advice), verb="evaluate") == (advice.replace("dataset.root", "--root"), 2)


def test_one_process_is_its_own_group():
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.sum_over_ranks(tensor) is tensor
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.agree("x") == "x"
    assert distributed.on_main(lambda: "x") == "x"
    assert distributed.any_rank(True, torch.device("cpu"))
    model = nn.BatchNorm2d(2)
    assert distributed.replicate(model, torch.device("cpu"), sync_batchnorm=True) is model


def test_a_mistake_on_the_main_process_reaches_the_others(monkeypatch):
    """Rank 1 gets the sentence that rank 0 broadcasts, and never calls the function itself."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "agree", lambda value: (None, "the file is torn"))
    with pytest.raises(InputError, match="the file is torn"):
        distributed.on_main(lambda: pytest.fail("only the main process calls it"))

    def torn():
        raise InputError("the file is torn")

    monkeypatch.setattr(distributed, "is_main", lambda: True)
    monkeypatch.setattr(distributed, "agree", lambda value: value)
    with pytest.raises(InputError, match="the file is torn"):
        distributed.on_main(torn)


def test_synchronised_batch_norm_wants_gpus(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match=r"sync_batchnorm=true needs GPUs.*set sync_batchnorm=false"):
        distributed.replicate(nn.BatchNorm2d(2), torch.device("cpu"), sync_batchnorm=True)
