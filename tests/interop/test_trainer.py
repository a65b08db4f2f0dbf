"""Hugging Face's Trainer drives a recipe through the optimizer alone."""

import pytest
import torch

import efftune
from tests.methods.models import batch, llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Data(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = batch(rows=8)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


@pytest.mark.parametrize("recipe", ["lora(r=4)", "int8 + lora(r=4)", "full", "lora(r=4) + lisa(layers=1, interval=2)"])
def test_training_through_trainer(recipe, tmp_path):
    tuner = efftune.apply(llama(), recipe)
    optimizer = tuner.optimizer(lr=1e-2)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=0, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=tuner.model, args=arguments, train_dataset=Data(), optimizers=(optimizer, None)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and tuner.step == 6
    tuner.save(tmp_path / "adapter")
    again = efftune.load(llama(), tmp_path / "adapter")
    ids = batch(seed=5)
    tuner.model.eval()
    with torch.no_grad():
        assert torch.equal(again.model.eval()(input_ids=ids).logits, tuner.model(input_ids=ids).logits)
