import torch
from torch.nn import functional as F
from transformers import MixtralForCausalLM

from moe.mini import mixtral_config, size
from moe.training.loss import document_losses, training_losses


def _model():
    torch.manual_seed(0)
    return MixtralForCausalLM(mixtral_config(size("tiny"))).eval()


def test_language_loss_is_the_mean_next_token_cross_entropy():
    model, rows = _model(), torch.randint(3, 512, (2, 17))
    logits = model(input_ids=rows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(training_losses(model, rows).language, expected)


def test_a_layer_that_always_takes_the_same_experts_costs_more_than_a_balanced_one():
    model, rows = _model(), torch.randint(3, 512, (4, 33))
    losses = training_losses(model, rows)
    gate = model.model.layers[2].mlp.gate
    with torch.no_grad():
        hidden = model.model(input_ids=rows[:, :-1], output_hidden_states=True).hidden_states[2]
        gate.weight[0] = 50 * hidden.flatten(0, 1).mean(dim=0)
    lopsided = training_losses(model, rows)
    assert (lopsided.total - lopsided.language) > (losses.total - losses.language)


def test_document_losses_ignore_padding():
    model = _model()
    row = torch.randint(3, 512, (1, 20))
    padded = F.pad(row, (0, 9))
    alone = document_losses(model, row, torch.tensor([20]))
    torch.testing.assert_close(document_losses(model, padded, torch.tensor([20])), alone)
