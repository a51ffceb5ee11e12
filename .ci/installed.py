"""What an installed wheel must do away from the checkout: import quickly, and take a step of multi-turn DPO."""

import sys
import time

MAX_IMPORT_S = 0.2

started = time.process_time()
import mtpo  # noqa: E402

seconds = time.process_time() - started
assert "torch" not in sys.modules, "import mtpo loads torch"
assert seconds < MAX_IMPORT_S, f"import mtpo takes {seconds:.2f} s of CPU"
assert sys.prefix in mtpo.__file__, f"mtpo is that of {mtpo.__file__}"

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, Gemma2Config  # noqa: E402

from mtpo.logprobs import action_logps  # noqa: E402
from mtpo.losses import paired_loss  # noqa: E402

sizes = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
model = AutoModelForCausalLM.from_config(Gemma2Config(vocab_size=32, num_hidden_layers=2, **sizes))
ids = torch.arange(20).reshape(2, 10)
mask = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 1, 1]]).repeat(2, 1)
logps = action_logps(model, ids, mask).sum(-1)
rho_w, rho_l = logps - logps.detach()
loss = paired_loss(rho_w[None], rho_l[None], "logistic").loss
loss.backward()
assert abs(loss.item() - 0.693147) < 1e-5, f"the loss of a policy that is its reference is {loss.item()}"
assert model.model.embed_tokens.weight.grad.abs().sum() > 0
print(f"mtpo {mtpo.__version__} works in {sys.prefix}: imported in {1000 * seconds:.0f} ms")
