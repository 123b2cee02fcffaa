"""Connections of engines: in order, refused to strangers, and their end is noticed."""

from __future__ import annotations

import socket
import threading

import pytest

from flexbatch.parallel.channel import open_store
from flexbatch.parallel.links import ADDRESS, link_engines, link_to_rank_0
from flexbatch.parallel.mesh import Mesh
from flexbatch.validation.errors import LostRankError


def test_engines_find_rank_0_and_their_end_is_noticed():
    mesh = Mesh(0, 3, "127.0.0.1:0", 0, 3, hosts_store=True)
    store = open_store(mesh)
    theirs = {}

    def mesh_of(engine: int) -> Mesh:
        return Mesh(engine, 3, f"127.0.0.1:{store.port}", engine, 3, hosts_store=False)

    def come(engine: int) -> None:
        own = mesh_of(engine)
        theirs[engine] = link_to_rank_0(own, open_store(own), engine)

    def disturb() -> None:
        port = int(open_store(mesh_of(1)).get(ADDRESS).decode().split()[0])
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"x" * 100)

    threads = [threading.Thread(target=disturb), *(threading.Thread(target=come, args=(k,)) for k in (2, 1))]
    for thread in threads:
        thread.start()
    links = link_engines(mesh, store, [1, 2])
    for thread in threads:
        thread.join()
    for engine, link in theirs.items():
        for number in range(200):
            link.send((engine, number, "x" * (100 if number % 50 else 100_000)))
    for engine, link in links.items():
        assert [link.receive()[:2] for _ in range(200)] == [(engine, number) for number in range(200)]
    theirs[1].close()
    with pytest.raises(LostRankError, match="engine 1 is gone"):
        links[1].receive()
    links[2].close()
    with pytest.raises(LostRankError, match="rank 0 is gone"):
        theirs[2].receive()


def test_who_does_not_come_is_named():
    mesh = Mesh(0, 2, "127.0.0.1:0", 0, 2, hosts_store=True)
    with pytest.raises(LostRankError, match="engines 1 did not come"):
        link_engines(mesh, open_store(mesh), [1], seconds=0.2)
    with pytest.raises(LostRankError, match="rank 1 was killed"):
        link_engines(mesh, open_store(mesh), [1], lambda: "rank 1 was killed")
