"""Federated fine-tuning of the small default model: clients are processes, and what goes over the wire is counted.

    python examples/federated.py [--clients 4] [--rounds 5] [--local-steps 10]

All know the base model and K shared seeds (`fedkseed`). The server holds K numbers. In each round every client gets
them, makes the current model from its base in one pass over the weights, takes a few zeroth-order steps on its own
texts, and sends (index of the seed, scalar) for each: 6 bytes. The server adds the mean over clients to its numbers.
"""

import argparse
import struct
from multiprocessing import get_context

import numpy as np
import torch

import efftune
from efftune.methods.zeroth_order.fedkseed import candidates
from efftune.optim.seed_log import DECAY, SeedLog
from efftune.optim.zeroth_order import stream_of
from efftune.train import batches, data, default_job, models
from efftune.train.loop import evaluate
from efftune.train.task import CAUSAL_LM

K, RATE, ROWS, LENGTH = 256, 1e-3, 4, 128
RECIPE = f"full + fedkseed(k={K})"


class Participant:
    """The base model, and the model that K numbers make of it."""

    def __init__(self):
        path = str(default_job.small_model())
        self.tokenizer = models.load_tokenizer(path)
        model, _ = models.load_model(path, "float32", None, self.tokenizer.pad_token_id)
        self.tuner = efftune.apply(model, RECIPE)
        self.base = {name: p.detach().clone() for name, p in self.tuner.named_trained().items()}

    @torch.no_grad()
    def become(self, numbers: np.ndarray) -> None:
        used = np.flatnonzero(numbers)
        seeds, a = [candidates(0, K)[i] for i in used], torch.from_numpy(numbers[used])
        for name, p in self.tuner.named_trained().items():
            efftune.perturb(self.base[name], a, seed=seeds, stream=stream_of(name), out=p)

    def rows(self, file, which: slice) -> batches.Data:
        examples = data.encode_lm(data.read_table(str(file)), self.tokenizer, LENGTH, "truncate")
        return batches.Data(
            examples[which], batches.collate_padded(self.tokenizer.pad_token_id, False), 0, 0, source=""
        )


def client(pipe, rank: int, clients: int, local_steps: int) -> None:
    torch.set_num_threads(1)
    me = Participant()
    mine = me.rows(default_job.prose()[0], slice(rank, None, clients))
    index = {seed: i for i, seed in enumerate(candidates(0, K))}
    step = 0
    while message := pipe.recv_bytes():
        me.become(np.frombuffer(message, np.float32))
        optimizer = me.tuner.optimizer(lr=RATE)
        me.tuner.seek(rank * 10**6 + step)  # clients draw different seeds
        position = mine.batches(mine.rows(step)[: ROWS * local_steps], ROWS)
        for batch in position:
            optimizer.zero_grad()
            me.tuner.backward(batch, CAUSAL_LM.loss, 1 / CAUSAL_LM.terms(batch))
            optimizer.step()
        step += local_steps
        log: SeedLog = optimizer.log
        pairs = [(index[int(d) & DECAY], scalar) for d, scalar, _ in log.fetch().tolist()]
        pipe.send_bytes(b"".join(struct.pack("<Hf", *pair) for pair in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local-steps", type=int, default=10)
    args = parser.parse_args()
    server = Participant()
    held_out = server.rows(default_job.prose()[1], slice(0, 48))

    def loss() -> float:
        return evaluate(server.tuner.model, held_out.batches(held_out.rows(0), 16), CAUSAL_LM, torch.device("cpu"))[
            "eval_loss"
        ]

    context, numbers, sent, received = get_context("spawn"), np.zeros(K, np.float32), 0, 0
    pipes = []
    for rank in range(args.clients):
        ours, theirs = context.Pipe()
        context.Process(target=client, args=(theirs, rank, args.clients, args.local_steps), daemon=True).start()
        pipes.append(ours)
    print(f"before   held-out loss {loss():.4f}")
    for turn in range(args.rounds):
        for pipe in pipes:
            pipe.send_bytes(numbers.tobytes())
            sent += numbers.nbytes
        for pipe in pipes:
            message = pipe.recv_bytes()
            received += len(message)
            for i, scalar in struct.iter_unpack("<Hf", message):
                numbers[i] += scalar / args.clients
        server.become(numbers)
        print(
            f"round {turn + 1:2}  held-out loss {loss():.4f}   sent {sent:,} bytes, received {received:,}", flush=True
        )
    for pipe in pipes:
        pipe.send_bytes(b"")
    weights = sum(p.numel() * 4 for p in server.base.values())
    print(f"Sending weights instead would have taken {2 * weights * args.clients * args.rounds:,} bytes.")


if __name__ == "__main__":
    main()
