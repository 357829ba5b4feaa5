"""The Inception graph as data, against a list of its nodes written by hand."""

import inception_graph

from edt.metrics.inception_graph import GRAPH, UNITS, Join, Pool


def test_units_are_those_of_the_published_graph():
    rows = []
    for unit in UNITS:
        shape = ",".join(map(str, (*unit.kernel, unit.channels_in, unit.channels_out)))
        rows.append(f"{unit.name} {unit.source} {shape} {unit.stride} {unit.padding}")
    assert rows == inception_graph.UNITS.strip().splitlines()


def test_pools_are_those_of_the_published_graph():
    pools = [node for node in GRAPH if isinstance(node, Pool)]
    maxima = {
        pool.name: (pool.source, pool.stride, pool.padding)
        for pool in pools
        if pool.op == "MaxPool"
    }
    assert maxima == inception_graph.MAX_POOLS
    averages = {pool.name: pool.source for pool in pools if pool.op == "AvgPool"}
    assert averages == {
        f"{block}/tower_2/pool": inception_graph.INPUTS[block]
        for block in inception_graph.AVERAGE_POOLS
    }


def test_joins_are_those_of_the_published_graph():
    joins = {node.name: node.sources for node in GRAPH if isinstance(node, Join)}
    assert joins == {
        f"{block}/join": tuple(f"{block}/{end}" for end in ends.split())
        for block, ends in inception_graph.JOINS.items()
    }


def test_every_node_runs_after_its_sources():
    finished = {"Mul"}
    for node in GRAPH:
        sources = node.sources if isinstance(node, Join) else (node.source,)
        assert finished.issuperset(sources), node
        finished.add(node.name)
