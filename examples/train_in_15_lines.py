import torch
from sklearn.datasets import load_digits

import fusion

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

result = fusion.train(
    model, "cross_entropy", (images, digits.target), steps=60, global_batch=64, micro_batch=16, workers=2, lr=3e-3
)
right = (model(images).argmax(1) == torch.tensor(digits.target)).float().mean()
print(f"loss {result.losses[0]:.2f} -> {result.losses[-1]:.2f}, {right:.0%} of the digits right")
