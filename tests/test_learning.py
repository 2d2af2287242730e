"""Lesson: it works. Memory supervised by a Transformer teaches an RNN to remember, without a rollout."""
import dmt
import smt
from evaluate import evaluate, networks
from model import load_checkpoint
from trainer import load_data


def test_smt_then_dmt_learns_retrieval(tmp_path):
    """A tiny RNN that never saw backpropagation through time carries a symbol over the whole sequence."""
    common = ["--eval_every", "0", "--ckpt_every", "0", "--log_every", "100", "--threads", "1"]
    smt.main(["--dataset", "retrieval", "--length", "10", "--symbols", "4", "--d_model", "32", "--n_heads", "2", "--mem_tokens", "2",
              "--enc_layers", "2", "--dec_layers", "1", "--rnn_layers", "1", "--steps", "400", "--batch_size", "32",
              "--out_dir", str(tmp_path / "smt"), *common])
    dmt.main(["--ckpt", str(tmp_path / "smt" / "ckpt.pt"), "--steps", "150", "--out_dir", str(tmp_path / "dmt"), *common])
    ckpt = load_checkpoint(str(tmp_path / "dmt" / "ckpt.pt"))
    task = load_data(ckpt["config"], "cpu")
    accuracy = evaluate(task, *networks(ckpt, "cpu"), n=500)["accuracy"]
    assert accuracy["teacher"] > 0.98, accuracy
    assert accuracy["rollout"] > 0.98, accuracy  # chance is 0.25
