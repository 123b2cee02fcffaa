"""The current stream of a GPU, by its address."""

import pytest
import torch

from flexbatch.kernels.streams import _stream_at, current_stream


@pytest.fixture
def streams(monkeypatch):
    """In the place of torch's: streams by address, and how many objects were made; the last is the current one."""
    current: list[int] = [0]
    made: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: current[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index=0: made.append(current[-1]) or (index, current[-1]))
    _stream_at.cache_clear()
    yield current, made
    _stream_at.cache_clear()


def test_the_current_stream_is_followed_and_made_once(streams):
    current, made = streams
    gpu = torch.device("cuda", 1)
    assert current_stream(gpu) == (1, 0)
    current.append(512)  # one is set for a copy, or captured
    assert current_stream(gpu) == (1, 512) and current_stream(torch.device("cuda", 0)) == (0, 512)
    current.pop()
    assert current_stream(gpu) == (1, 0) and made == [0, 512, 512]


def test_a_device_without_a_number_is_the_current_one(streams):
    _, made = streams
    assert current_stream(torch.device("cuda")) == current_stream(torch.device("cuda")) == (0, 0)
    assert made == [0, 0]


@pytest.mark.gpu
def test_streams_of_a_gpu():
    gpu, other = torch.device("cuda", 0), torch.cuda.Stream()
    assert current_stream(gpu) == torch.cuda.current_stream()
    with torch.cuda.stream(other):
        assert current_stream(gpu) == other
    assert current_stream(gpu) == torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert current_stream(gpu) == torch.cuda.current_stream() != torch.cuda.default_stream()
        torch.zeros(1, device=gpu)
