"""Lesson: it works. Memory supervised by a Transformer teaches an RNN to remember, without a
rollout."""
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import recipe

import bptt
import dmt
import muon
import smt
import trainer
from checkpoints import load_checkpoint
from evaluate import evaluate, networks
from flags import load_data
from trainer import make_optimizers


def test_smt_then_dmt_learns_retrieval(tmp_path):
    """A tiny RNN that never saw backpropagation through time carries a symbol over the whole
    sequence."""
    common = ["--eval_every", "0", "--ckpt_every", "0", "--log_every", "100", "--threads", "1"]
    smt.main(["--dataset", "retrieval", "--length", "10", "--symbols", "4", "--d_model", "32",
              "--n_heads", "2",
              "--mem_tokens", "2", "--enc_layers", "2", "--dec_layers", "1",
              "--steps", "400", "--batch_size", "32",
              "--out_dir", str(tmp_path / "smt"), *common])
    dmt.main(["--ckpt", str(tmp_path / "smt" / "ckpt.pt"), "--steps", "150", "--out_dir",
              str(tmp_path / "dmt"), *common])
    ckpt = load_checkpoint(str(tmp_path / "dmt" / "ckpt.pt"))
    task = load_data(ckpt["config"], "cpu")
    accuracy = evaluate(task, *networks(ckpt, "cpu"), n=500)["accuracy"]
    assert accuracy["teacher"] > 0.98, accuracy
    assert accuracy["rollout"] > 0.98, accuracy  # chance is 0.25


@pytest.mark.parametrize("encoder", ["causal", "bidirectional"])
@pytest.mark.parametrize("rnn", ["transformer", "mlp", "gru"])
def test_muon_takes_the_matrices_and_adamw_the_rest(rnn, encoder):
    """Every trained parameter has exactly one optimiser; no embedding, register, m_0 or head is
    orthogonalised."""
    nets = dict(zip(("encoder", "decoder", "rnn"), tiny.networks(rnn=rnn, encoder=encoder)))
    nets["heads"] = tiny.heads()
    groups = [[p for name in ("encoder", "decoder", "heads") for p in nets[name].parameters()],
              [*nets["rnn"].updater.parameters()]]
    names = {id(p): f"{net}.{name}" for net in nets for name, p in nets[net].named_parameters()}
    trained = {names[id(p)] for group in groups for p in group}
    taken = [{names[id(p)] for g in optimizer.param_groups for p in g["params"]}
             for optimizer in make_optimizers(recipe(smt), nets, groups, "cpu")]
    assert taken[0] | taken[1] == trained and not taken[0] & taken[1]
    assert not [name for name in taken[1]
                if any(w in name for w in ("symbol", "time", "registers", "m0", "head", "bias"))]
    assert {"encoder.blocks.0.w_qkv.weight", "encoder.w_memory.weight", "decoder.w_read.weight",
            "decoder.blocks.1.w_down.weight"} <= taken[1] and "heads.linear.weight" in taken[0]
    one, = make_optimizers(recipe(smt, optimizer="adamw"), nets, groups, "cpu")
    assert {names[id(p)] for g in one.param_groups for p in g["params"]} == trained


def test_the_schedule_reaches_every_parameter():
    """Warm-up and decay are everybody's: an optimiser may have several groups of parameters, and
    each has its own rate to set."""
    nets = dict(zip(("encoder", "decoder", "rnn"), tiny.networks(rnn="gru")))
    cfg = recipe(smt, lr=1.0, warmup=10, decay=0.1, steps=100)
    optimizers = make_optimizers(cfg, nets, [[p for net in nets.values()
                                              for p in net.parameters()]], "cpu")
    groups = [g for optimizer in optimizers for g in optimizer.param_groups]
    assert len(groups) > len(optimizers)  # else nothing is shown
    for step, rate in ((0, 0.1), (50, 0.55), (100, 0.1)):
        trainer.Run.set_learning_rate(SimpleNamespace(
            cfg=cfg, step=step, progress=step / 100, optimizers=optimizers))
        assert [g["lr"] for g in groups] == pytest.approx([rate] * len(groups), abs=0.01)


def test_a_step_of_muon_is_orthogonal():
    """Its step on a square matrix has nearly equal singular values, however unequal those of the
    gradient are."""
    torch.manual_seed(0)
    block = torch.nn.ModuleDict(dict(w_a=torch.nn.Linear(16, 16, bias=False)))
    w = block["w_a"].weight
    before = w.detach().clone()
    optimizer, = make_optimizers(recipe(smt, lr=1.0), dict(net=block), [[w]], "cpu")
    u, v = torch.linalg.svd(torch.randn(16, 16))[::2]
    # singular values from 1 to 1/20
    w.grad = u @ torch.logspace(0, -1.3, 16).diag() @ v
    optimizer.step()
    spread = torch.linalg.svdvals(w.detach() - before)
    assert spread[0] / spread[-1] < 2


@pytest.mark.parametrize("shape", [(8, 12), (24, 4)])
def test_muon_takes_maps_of_one_parameter_apart(shape):
    """A parameter that is two maps, one below the other, moves as these would by themselves."""
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(shape))
    parts = [torch.nn.Parameter(v.clone()) for v in whole.detach().chunk(2)]
    pair = [muon.Muon([dict(params=[whole], maps=2)], lr=0.1), muon.Muon(parts, lr=0.1)]
    for _ in range(3):
        whole.grad = torch.randn(shape)
        for p, g in zip(parts, whole.grad.chunk(2)):
            p.grad = g.clone()
        for optimizer in pair:
            optimizer.step()
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


def test_muon_takes_the_steps_of_torchs():
    """Ten steps on two shapes agree with torch.optim.Muon, which orthogonalises in bf16 (8 bits),
    one matrix at a time."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon of its own to compare with; 2.9 has")
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(0.1 * torch.randn(shape)) for shape in [(12, 4), (4, 12), (12, 4)]]
    start = [p.detach().clone() for p in ours]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    pair = [muon.Muon(ours, lr=0.01),
            torch.optim.Muon(theirs, lr=0.01, momentum=0.95, weight_decay=0.01,
                             adjust_lr_fn="match_rms_adamw")]
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.03 * (q - before).norm()


def test_every_script_learns_from_several_lengths(tmp_path):
    """Batches of 16, 8 and 4 times, and the log counts them. DMT's sequences go on side by side
    and have the full length."""
    common = "--log_every 1 --eval_every 0 --ckpt_every 0 --threads 1 --n_val 2 --batch_size 4"
    sizes = "--d_model 8 --n_heads 1 --mem_tokens 2 --dec_layers 1"
    task = "--dataset retrieval --length 16 --shortest 4"
    starts = dict(smt=f"{task} {sizes} --micro 1", bptt=f"{task} {sizes} --truncate 4",
                  dmt=f"--ckpt {tmp_path}/smt/ckpt.pt --span 5 --spans 9")
    for name in ("smt", "bptt", "dmt"):
        script = dict(smt=smt, bptt=bptt, dmt=dmt)[name]
        script.main(f"{starts[name]} --steps 12 {common} --out_dir {tmp_path}/{name}".split())
        rows = [line.split(",") for line in (tmp_path / name / "log.csv").read_text().split()]
        seen = [int(float(row[rows[0].index("tokens")])) for row in rows[1:]]
        expected = {4 * 16} if name == "dmt" else {4 * 16, 4 * 8, 4 * 4}
        assert {b - a for a, b in zip([0, *seen], seen)} == expected, name
