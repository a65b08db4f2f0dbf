import torch


def check_indices(indices, shape):
    n, k = shape
    i = indices.long()
    if i.ndim != 1 or (len(i) and (int(i.min()) < 0 or int(i.max()) >= n * k)):
        raise ValueError("outside")
    if len(i) > 1 and bool((i[1:] <= i[:-1]).any()):
        raise ValueError("sorted")


def entries_grad(g, z, indices):
    k = z.shape[1]
    out = []
    t = torch.promote_types(g.dtype, torch.float32)
    for i in indices.split(16):
        out.append((g[:, (i // k).long()].to(t) * z[:, (i % k).long()].to(t)).sum(0))
    return torch.cat(out)
