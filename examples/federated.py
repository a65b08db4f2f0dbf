"""Federated fine-tuning of the small default model: clients are processes, and what goes over the wire is counted.

    python examples/federated.py [--method fedkseed|ferret] [--clients 4] [--rounds 5] [--local-steps 10]

All know the base model and share seeds. `fedkseed`: the server holds K numbers. In each round every client gets them,
makes the current model from its base in one pass over the weights, takes a few zeroth-order steps on its own texts, and
sends (index of the seed, scalar) for each: 6 bytes. The server adds the mean over clients to its numbers. `ferret`:
clients take AdamW's steps and send their change as scalar products with random directions, one for every 16 weights.
The server answers with the mean over clients, and all add what it stands for to the weights that the round began with.
"""

import argparse
import struct
from multiprocessing import get_context

import numpy as np
import torch

import efftune
from efftune.methods.zeroth_order.fedkseed import candidates
from efftune.methods.zeroth_order.ferret import Ferret
from efftune.optim.directions import stream_of
from efftune.optim.seed_log import DECAY, SeedLog
from efftune.train import batches, data, default_job, models
from efftune.train.loop import evaluate
from efftune.train.task import CAUSAL_LM

K, RATE, ROWS, LENGTH = 256, 1e-3, 4, 128


class Participant:
    """The base model and the current one. The server and the clients hear the same messages."""

    recipe = "full"

    def __init__(self):
        path = str(default_job.small_model())
        self.tokenizer = models.load_tokenizer(path)
        model, _ = models.load_model(path, "float32", None, self.tokenizer.pad_token_id)
        self.tuner = efftune.apply(model, self.recipe)
        self.base = {name: p.detach().clone() for name, p in self.tuner.named_trained().items()}

    def rows(self, file, which: slice) -> batches.Data:
        examples = data.encode_lm(data.read_table(str(file)), self.tokenizer, LENGTH, "truncate")
        return batches.Data(
            examples[which], batches.collate_padded(self.tokenizer.pad_token_id, False), 0, 0, source=""
        )

    def train(self, rows, step: int) -> torch.optim.Optimizer:
        optimizer = self.tuner.optimizer(lr=RATE)
        self.tuner.seek(step)
        for batch in rows:
            optimizer.zero_grad()
            self.tuner.backward(batch, CAUSAL_LM.loss, 1 / CAUSAL_LM.terms(batch))
            optimizer.step()
        return optimizer


class ZerothOrder(Participant):
    """Hears K numbers, which make the current model of the base; says (index, scalar) for each step."""

    recipe = f"full + fedkseed(k={K})"

    def __init__(self):
        super().__init__()
        self.numbers = np.zeros(K, np.float32)
        self.index = {seed: i for i, seed in enumerate(candidates(0, K))}

    @torch.no_grad()
    def hear(self, message: bytes) -> None:
        self.numbers = np.frombuffer(message, np.float32).copy()
        used = np.flatnonzero(self.numbers)
        seeds, a = [candidates(0, K)[i] for i in used], torch.from_numpy(self.numbers[used])
        for name, p in self.tuner.named_trained().items():
            efftune.perturb(self.base[name], a, seed=seeds, stream=stream_of(name), out=p)

    def say(self, optimizer) -> bytes:
        log: SeedLog = optimizer.log
        pairs = [(self.index[int(d) & DECAY], scalar) for d, scalar, _ in log.fetch().tolist()]
        return b"".join(struct.pack("<Hf", *pair) for pair in pairs)

    def mean(self, said: list[bytes]) -> bytes:
        numbers = self.numbers.copy()
        for i, scalar in struct.iter_unpack("<Hf", b"".join(said)):
            numbers[i] += scalar / len(said)
        return numbers.tobytes()


class FirstOrder(Participant):
    """Hears the mean change of a round, which moves the base; says its own."""

    method, turn = Ferret(scale=1.0), 0

    def hear(self, message: bytes) -> None:
        numbers, seeds = torch.frombuffer(bytearray(message), dtype=torch.float32), self.method.seeds(self.turn)
        for name, p in self.tuner.named_trained().items():
            mine, numbers = numbers.tensor_split([self.method.count(p)])
            self.method.reconstruct(name, self.base[name], mine, seeds, out=self.base[name])
            p.data.copy_(self.base[name])
        self.turn += 1

    def say(self, optimizer) -> bytes:
        seeds = self.method.seeds(self.turn)
        trained = self.tuner.named_trained().items()
        return b"".join(self.method.project(n, p, self.base[n], seeds).numpy().tobytes() for n, p in trained)

    def mean(self, said: list[bytes]) -> bytes:
        return np.mean([np.frombuffer(message, np.float32) for message in said], 0).tobytes()


METHODS = {"fedkseed": ZerothOrder, "ferret": FirstOrder}


def client(pipe, method: str, rank: int, clients: int, local_steps: int) -> None:
    torch.set_num_threads(1)
    me = METHODS[method]()
    mine = me.rows(default_job.prose()[0], slice(rank, None, clients))
    step = 0
    while pipe.recv_bytes() == b"train":
        rows = mine.batches(mine.rows(step)[: ROWS * local_steps], ROWS)
        pipe.send_bytes(me.say(me.train(rows, rank * 10**6 + step)))  # clients draw different seeds
        step += local_steps
        me.hear(pipe.recv_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="fedkseed")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local-steps", type=int, default=10)
    args = parser.parse_args()
    server = METHODS[args.method]()
    held_out = server.rows(default_job.prose()[1], slice(0, 48))

    def loss() -> float:
        return evaluate(server.tuner.model, held_out.batches(held_out.rows(0), 16), CAUSAL_LM, torch.device("cpu"))[
            "eval_loss"
        ]

    context, pipes, sent, received = get_context("spawn"), [], 0, 0
    for rank in range(args.clients):
        ours, theirs = context.Pipe()
        context.Process(
            target=client, args=(theirs, args.method, rank, args.clients, args.local_steps), daemon=True
        ).start()
        theirs.close()  # so that a client that dies ends the wait for it
        pipes.append(ours)
    print(f"before   held-out loss {loss():.4f}")
    for turn in range(args.rounds):
        for pipe in pipes:
            pipe.send_bytes(b"train")
        said = [pipe.recv_bytes() for pipe in pipes]
        answer = server.mean(said)
        for pipe in pipes:
            pipe.send_bytes(answer)
        server.hear(answer)
        received += sum(map(len, said))
        sent += len(answer) * len(pipes)
        print(
            f"round {turn + 1:2}  held-out loss {loss():.4f}   sent {sent:,} bytes, received {received:,}", flush=True
        )
    for pipe in pipes:
        pipe.send_bytes(b"")
    weights = sum(p.numel() * 4 for p in server.base.values())
    print(f"Sending weights instead would have taken {2 * weights * args.clients * args.rounds:,} bytes.")


if __name__ == "__main__":
    main()
