"""What TensorBoard's own tabs show of a record, as its own plugins read it, on both of its backends."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import re
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.data import provider, server_ingester
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar import custom_scalars_plugin, layout_pb2
from tensorboard.plugins.histogram import histograms_plugin, summary_v2
from tensorboard.plugins.scalar import scalars_plugin
from tensorboard.util import grpc_util, tensor_util

from bnwatch.signals import STATISTICS, WINDOW
from bnwatch.sinks.tensorboard import TensorBoardSink, pictures, schema
from bnwatch.sinks.tensorboard.writer import safe_path
from tests import samples

SHIFT = STATISTICS.index("mean_shift")
PATHS = tuple(f"block_{n}/bn" for n in range(5))
WORST = {"a/bnwatch": samples.HOSTILE, "b/bnwatch": "a+b(c)"}
LAST = 3 * WINDOW + 2
CTX = context.RequestContext()


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    for run, worst in WORST.items():
        sink = TensorBoardSink((top / run).parent)
        sink.write(samples.attachment(*PATHS, worst))
        for step in range(1, LAST + 1):
            table = samples.table(step, *PATHS, worst)
            table.values[:, [SHIFT, STATISTICS.index("std_ratio")]] = 0.1, 1.0
            table.values[-1, SHIFT] = 100.0
            sink.write(table)
            sink.write(samples.channels(step, worst))
        sink.write(samples.evaluation(LAST))
        sink.close(samples.report(steps=LAST))
    return top


@pytest.fixture(scope="module", params=["py", "rust"])
def reads(request, log_dir, tmp_path_factory):
    """Return what the plugins of TensorBoard read from, on one of its backends."""
    if request.param == "py":
        multiplexer = plugin_event_multiplexer.EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(log_dir))
        multiplexer.Reload()
        yield data_provider.MultiplexerDataProvider(multiplexer, str(log_dir))
        return
    try:
        binary = server_ingester.get_server_binary().path
    except server_ingester.NoDataServerError as error:
        pytest.skip(f"TensorBoard's data server does not run here: {error}")
    port = tmp_path_factory.mktemp("server") / "port"
    command = [binary, f"--logdir={log_dir}", "--reload=once", "--port=0", f"--port-file={port}", "--die-after-stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
        wait(lambda: port.exists() and port.read_text().endswith("\n"))
        address = f"localhost:{port.read_text().strip()}"
        ingester = server_ingester.ExistingServerDataIngester(
            address, channel_creds_type=grpc_util.ChannelCredsType.LOCAL
        )
        ingester.start()
        wait(lambda: len(listed(ingester.data_provider, "text")) == len(WORST))
        yield ingester.data_provider
        server.stdin.close()


def wait(until):
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listed(reads, plugin):
    return reads.list_tensors(CTX, experiment_id="", plugin_name=plugin)


def plugin_of(kind, reads):
    flags = argparse.Namespace(generic_data="true", samples_per_plugin={})
    plugins = {}
    made = base_plugin.TBContext(data_provider=reads, flags=flags, plugin_name_to_instance=plugins)
    plugins["scalars"] = scalars_plugin.ScalarsPlugin(made)
    return kind(made)


def test_custom_scalars_shows_the_worst_layers(reads):
    plugin = plugin_of(custom_scalars_plugin.CustomScalarsPlugin, reads)
    (category,) = json.loads(plugin.layout_impl(CTX, ""))["category"]
    titles = [chart["title"] for chart in category["chart"]]
    assert titles[:2] == ["accuracy", "farthest off of all layers"]
    assert len(set(titles)) == len(titles)
    for run, worst in WORST.items():
        found = set()
        for chart in category["chart"]:
            for regex in chart["multiline"]["tag"]:
                answer = plugin.scalars_impl(CTX, run, regex, "")
                assert answer["regex_valid"]
                assert len(answer["tag_to_events"]) <= 1
                found |= set(answer["tag_to_events"])
        assert {"bnwatch/accuracy/train", "bnwatch/accuracy/evaluation", "bnwatch/worst/mean_shift"} <= found
        assert len([tag for tag in found if tag.startswith(schema.LAYER)]) == 6
        assert f"{schema.LAYER}{safe_path(worst)}/log_std_ratio" in found
        assert safe_path(worst) in titles


def test_a_tag_is_escaped_in_a_layout():
    message = layout_pb2.Layout.FromString(pictures.layout({"x": ["a+b(c)/y", "a"]}))
    for regex, tag in zip(message.category[0].chart[0].multiline.tag, ["a+b(c)/y", "a"], strict=True):
        assert re.match(regex, tag)
        assert not re.match(regex, tag + "b")


def test_distributions_are_those_of_the_channels(reads):
    plugin = plugin_of(histograms_plugin.HistogramsPlugin, reads)
    for run, worst in WORST.items():
        tags = plugin.index_impl(CTX, "")[run]
        assert set(tags) == {
            f"{schema.DISTRIBUTION}{safe_path(worst)}/{name}" for name in ("mean_shift", "log_std_ratio")
        }
        for tag in tags:
            events, _ = plugin.histograms_impl(CTX, tag, run, "")
            assert events[-1][1] == LAST
            expected = samples.channels(LAST, worst).apart(1e-3)
            with np.errstate(divide="ignore"):
                expected = expected["mean_shift"] if tag.endswith("mean_shift") else np.log(expected["std_ratio"])
            expected = expected[np.isfinite(expected)]
            buckets = np.array(events[-1][2])
            assert buckets.shape == (pictures.BUCKETS, 3)
            assert buckets[:, 2].sum() == expected.size
            assert buckets[0, 0] == expected.min()
            assert buckets[-1, 1] == expected.max()


def test_the_heatmap_is_a_picture_of_the_size_it_says(reads):
    blobs = reads.read_blob_sequences(
        CTX, experiment_id="", plugin_name="images", run_tag_filter=provider.RunTagFilter(), downsample=10
    )
    assert set(blobs) == set(WORST)
    for run in WORST:
        (sequence,) = blobs[run].values()
        # while training, and at the end
        assert sequence[-1].step == LAST
        assert len(sequence) == 5
        width, height, data = (reads.read_blob(CTX, blob_key=blob.blob_key) for blob in sequence[-1].values)
        picture = unpacked(data)
        assert picture.shape == (int(height), int(width), 3)
        # the worst layer is the last, and the darkest
        assert (picture[-1] == (70, 0, 20)).all()
        assert not (picture[0] == (70, 0, 20)).all(axis=-1).any()


def unpacked(data):
    """Return a picture as ``(height, width, 3)``, and check what the standard asks of it."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    parts, place = {}, 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        name, part = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(name + part)
        parts[name], place = part, place + 12 + length
    assert list(parts) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert rest == [4, 3, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    pixels = np.stack([lines[:, 1:] >> 4, lines[:, 1:] & 15], axis=2).reshape(height, -1)[:, :width]
    return np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)[pixels]


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7)])
def test_a_png_holds_its_pixels(shape):
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (16, 3)).astype(np.uint8)
    pixels = rng.integers(0, 16, shape).astype(np.uint8)
    data = pictures.png(pixels, palette)
    assert np.array_equal(unpacked(data), palette[pixels])
    image = pytest.importorskip("PIL.Image", reason="a second reader of PNG: Pillow is not installed")
    with image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(np.asarray(opened.convert("RGB")), palette[pixels])


def shifted(step, values):
    table = samples.table(step, *(f"bn_{n}" for n in range(len(values))))
    table.values[:, SHIFT] = values
    table.values[:, STATISTICS.index("std_ratio")] = 1.0
    return table


@pytest.mark.parametrize("many", [1, pictures.COLUMNS - 1, pictures.COLUMNS, 5 * pictures.COLUMNS + 3])
def test_a_heatmap_loses_no_outlier_and_stays_small(many):
    heatmap = pictures.Heatmap()
    outlier = many // 3
    for step in range(many):
        heatmap.add(shifted(step + 1, [0.0, math.nan if step == outlier else 0.0, 9.0 if step == many - 1 else 0.1]))
    width, height, data = heatmap.image()
    picture = unpacked(data)
    assert picture.shape == (height, width, 3)
    assert width <= 1024
    third = height // 3
    assert (picture[0] == 255).all()
    assert (picture[third] == (0, 110, 255)).all(axis=1).any()
    assert (picture[2 * third, -1] == (70, 0, 20)).all()
    assert heatmap.image() is None


def test_a_heatmap_of_very_many_call_sites_lets_neighbours_share_a_row():
    heatmap = pictures.Heatmap()
    values = np.zeros(2 * pictures.ROWS + 1)
    values[[0, -1]] = 9.0
    heatmap.add(shifted(1, values))
    width, height, data = heatmap.image()
    assert (width, height) == (16, -(-len(values) // 3))
    dark = (unpacked(data) == (70, 0, 20)).all(axis=(1, 2))
    assert np.flatnonzero(dark).tolist() == [0, height - 1]


def test_a_heatmap_begins_anew_with_other_call_sites():
    heatmap = pictures.Heatmap()
    heatmap.add(shifted(1, [9.0]))
    heatmap.add(dataclasses.replace(shifted(2, [0.0]), sites=(), values=np.zeros((0, len(STATISTICS)), np.float32)))
    heatmap.add(shifted(2, [0.0, 0.0]))
    assert (unpacked(heatmap.image()[2]) == 255).all()
    assert pictures.Heatmap().image() is None


FLOATS = hnp.arrays(np.float64, st.integers(0, 30), elements=st.floats(allow_subnormal=False))


@given(FLOATS)
def test_a_histogram_is_that_of_tensorboard(values):
    finite = values[np.isfinite(values) & (np.abs(values) < 1e150)]
    found = pictures.histogram(np.append(finite, [np.nan, np.inf]))
    theirs = tensor_util.make_ndarray(summary_v2.histogram_pb("x", finite).value[0].tensor)
    assert found.shape == theirs.shape
    assert np.allclose(found[:, :2], theirs[:, :2])
    assert found[:, 2].sum() == finite.size
    if finite.size and (np.ptp(finite) == 0 or np.ptp(finite) > 1e-9 * np.abs(finite).max()):
        # a value at an edge may be rounded into either bucket
        assert np.abs(np.cumsum(found[:, 2]) - np.cumsum(theirs[:, 2])).max() <= np.sum(near_an_edge(finite, found))


def near_an_edge(values, buckets):
    edges = np.append(buckets[:, 0], buckets[-1, 1])
    return np.abs(values[:, None] - edges).min(axis=1) <= 1e-12 * np.ptp(values)


def test_nothing_of_this_imports_tensorflow_or_a_plotting_library(tmp_path):
    program = (
        "import sys\n"
        "from bnwatch.sinks.tensorboard import TensorBoardSink\n"
        "from tests import samples\n"
        "sink = TensorBoardSink(sys.argv[1])\n"
        "sink.write(samples.table(1))\n"
        "sink.write(samples.channels(1))\n"
        "sink.close(samples.report())\n"
        "print(sorted({'tensorflow', 'PIL', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"
