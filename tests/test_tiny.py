"""One small file through every stage, each printed (``pytest -s``) and checked: the first test to read."""

from __future__ import annotations

import numpy as np

from support.paths import DATA
from zincmetal import gguf, models
from zincmetal.device import backend
from zincmetal.device.buffers import Buffers, compiled, map_weights, row_records
from zincmetal.graph.builder import Graph
from zincmetal.graph.ops import NEXT, RESULTS, STEP
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target
from zincmetal.text.tokenizer import Tokenizer

FILE, N = DATA / "llama-q4_k_m.gguf", 16


def test_a_file_becomes_text() -> None:
    exact = np.load(FILE.with_suffix(".npz"))  # the same model computed in float32 outside of this package
    core, device = backend.open_device("cpu")
    with gguf.open(FILE) as file:
        print("gguf:", len(file.tensors), "tensors, among them", file.tensors["token_embd.weight"])
        print("config:", cfg := models.configure(file, 64))
        assert (cfg.arch, file.tensors["token_embd.weight"].shape) == ("llama", (cfg.n_vocab, cfg.n_embd))
        planner = Planner(file, Target.of(core, device.info), cfg.n_ctx)
        graph = Graph(cfg, planner.addresses.weight)
        graph.logits(graph.rms_norm(models.get(cfg.arch).build(graph), "output_norm"))
        print("graph:", *(op.kind for op in graph.ops))
        assert sum(op.kind == "attention" for op in graph.ops) == cfg.n_layer
        print("plan:", (plan := planner.plan()).dump())
        assert (plan.hazards(), len(plan.dispatches) < len(graph.ops)) == ([], True)
        buffers = Buffers(device, map_weights(device, file, planner.addresses), planner.addresses)
        buffers.alloc("arena", plan.arena_bytes)
        memory = [buffers.buffer(state.name) for state in (STEP, *NEXT, RESULTS)]
        steps, program = core.Steps(device, *memory, cfg.n_vocab, 1), compiled(plan, core, device, buffers.buffer)
        page, tokens = np.zeros(1, core.params_dtype("PageWrite")), []  # page 0 holds all of this sequence
        for position, given in enumerate(exact["tokens"][:N]):
            row = row_records(core, [(position, 1)])
            row["token"] = given
            core.decode_step(steps, program, row, np.zeros(1, np.uint32), page, None, 1)
            tokens.append(int(core.collect_step(steps)["id"][0]))
        print("tokens:", tokens, "text:", text := Tokenizer.from_metadata(file.metadata).decode(tokens))
    assert (tokens[-1], bool(text)) == (exact["logprobs"][[*exact["prefix_lengths"]].index(N)].argmax(), True)
