"""A host that is not installed is named, with the extra that brings it."""

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["guides", "sentence_transformers"])
def test_the_extra_is_named(name, monkeypatch):
    module = f"drrho.integrations.{name}"
    for each in [other for other in sys.modules if other.partition(".")[0] == "sentence_transformers"]:
        monkeypatch.delitem(sys.modules, each)
    for each in ("drrho.integrations.guides", "drrho.integrations.sentence_transformers"):
        monkeypatch.delitem(sys.modules, each, raising=False)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"sentence_transformers.*: pip install 'drrho\[integrations\]'"):
        importlib.import_module(module)


def test_open_clips_loss_needs_no_host(monkeypatch):
    for each in [other for other in sys.modules if other.partition(".")[0] in ("open_clip", "open_clip_train")]:
        monkeypatch.delitem(sys.modules, each)
    monkeypatch.delitem(sys.modules, "drrho.integrations.open_clip", raising=False)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert importlib.import_module("drrho.integrations.open_clip").SteeredClipLoss().coefficient == 1.0
