"""Writes a model as OpenAI published its own: a TorchScript archive in half precision."""

import warnings

import torch


class Published(torch.nn.Module):
    """A model with what OpenAI's archives have beside the weights: sizes, and a mask that models make themselves."""

    def __init__(self, model):
        super().__init__()
        for name, value in model.named_children():
            setattr(self, name, value)
        for name, value in model.named_parameters(recurse=False):
            setattr(self, name, value)
        self.register_buffer("attn_mask", model.attn_mask)
        for name, size in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(size))

    def forward(self, image):
        return self.visual(image)


def write_archive(model, path):
    """Write the archive of a model, which has half precision afterwards; the folder in it has the file's name."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        torch.jit.save(torch.jit.trace(Published(model.half().eval()), torch.zeros(1, 3, 32, 32).half()), path)
