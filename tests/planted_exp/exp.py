import sys, time, random, argparse
from argparse import ArgumentParser, Namespace
import torch, toy
from fairseq.optim import OPTIMIZER_REGISTRY
import lslora_fairseq.optim.pruned
torch.set_num_threads(1); import logging; logging.disable(logging.INFO)
ap = argparse.ArgumentParser()
for k, v in dict(seeds="0,1,2", updates=600, lr=0.01, sparsity=0.7, n=64, d=32, ffn=64, layers=2, size=2.0, begin=0.25, dur=0.5, noise=0.0, decay=1, equal=0,
    enc="self_attn.v_proj,fc1", dec="encoder_attn.v_proj,fc2", loss="mse", length=7, rank=8, eside="", verbose=0, mods="default", tol=0, warm=0).items():
    ap.add_argument("--"+k, type=type(v), default=v)
a = ap.parse_args()
def options(**more):
    p = ArgumentParser(); OPTIMIZER_REGISTRY["pruned_adam"].add_args(p)
    return Namespace(**{**vars(p.parse_args([])), "tpu": False, **more})
def run(seed):
    g = torch.Generator().manual_seed(100+seed)
    order = torch.randperm(4, generator=g).tolist()
    ranks = [0]*4
    for r, l in zip((1,2,4,8), order): ranks[l]=r
    common = dict(encoder_layers=a.layers, decoder_layers=a.layers, encoder_embed_dim=a.d, encoder_ffn_embed_dim=a.ffn)
    if a.eside: common["encoder_index_side"]=a.eside
    teacher = toy.build(seed=seed, **common, lora_rank=",".join(f"{c}={r}" for c, r in zip(toy.CODES, ranks)), encoder_target_modules=a.enc, decoder_target_modules=a.dec)
    with torch.no_grad():
        for lin in teacher.adapted_linears():
            for l, r in enumerate(ranks):
                A, B = lin.factors(l)
                for m in (A, B):
                    w = torch.randn(m.shape, generator=g)
                    m.copy_(w / w.norm(dim=1, keepdim=True))
                B.mul_(a.size / (r**.5 if a.equal else 1))
    teacher.eval()
    student = toy.build(seed=seed, **common, lora_rank=str(a.rank))
    # check base equality
    sd, td = student.state_dict(), teacher.state_dict()
    for k in td:
        if "adapters" not in k: assert torch.equal(sd[k], td[k]), k
    dur = int(a.dur*a.updates)
    opt = OPTIMIZER_REGISTRY["pruned_adam"](options(lr=[a.lr], pruning_final_sparsity=a.sparsity, pruning_begin=int(a.begin*a.updates), pruning_duration=dur, pruning_unit="update", pruning_scope="layer", adam_betas="(0.9, 0.98)"), toy.adapters(student))
    student.train()
    losses=[]
    for u in range(a.updates):
        src = torch.arange(a.n)[torch.randperm(a.n, generator=g)] % 4
        tgt = torch.arange(a.n)[torch.randperm(a.n, generator=g)] % 4
        net = toy.batch(list(zip(src.tolist(), tgt.tolist())), length=a.length, seed=seed*100000+u)
        opt.prune_at(1, u)
        if a.decay: opt.set_lr(a.lr*(1-u/a.updates))
        with torch.no_grad(): want = teacher(**net, features_only=(a.loss=="mse"))[0]
        if a.noise: want = want + a.noise*torch.randn(want.shape, generator=g)
        opt.zero_grad()
        got = student(**net, features_only=(a.loss=="mse"))[0]
        loss = (got-want).square().mean() if a.loss=="mse" else torch.nn.functional.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="sum")/want[...,0].numel()
        opt.backward(loss); opt.step()
        losses.append(loss.item())
    opt.prune_at(1, a.updates)
    lang = [[0,0] for _ in range(4)]; mods={}
    langstack={"encoder":[[0,0] for _ in range(4)],"decoder":[[0,0] for _ in range(4)]}
    for lin in student.adapted_linears():
        for l in range(4):
            m = lin.masks(l)[1]
            k, t = m.sum().item(), m.numel()
            e = mods.setdefault((lin.site.stack, lin.site.module), [0,0])
            for x in (lang[l], e, langstack[lin.site.stack][l]): x[0]+=k; x[1]+=t
    share = lambda x: x[0]/x[1]
    ls = [share(lang[l]) for l in order]
    planted = {("encoder",m) for m in a.enc.split(",")} | {("decoder",m) for m in a.dec.split(",")}
    res = {k: share(v) for k,v in mods.items()}
    lok = all(y>x for x,y in zip(ls, ls[1:]))
    lm = min(y-x for x,y in zip(ls, ls[1:]))
    mm = min(min(res[k] for k in res if k[0]==s and k in planted)-max(res[k] for k in res if k[0]==s and k not in planted) for s in ("encoder","decoder"))
    # rule suggest
    kept = set()
    for s in ("encoder","decoder"):
        tot = [sum(v[i] for k,v in mods.items() if k[0]==s) for i in (0,1)]
        kept |= {k for k in mods if k[0]==s and res[k] >= .5*tot[0]/tot[1]}
    return lok, mm>0, kept==planted, lm, mm, ls, {k:res[k] for k in sorted(res, key=lambda k:-res[k])}, planted, losses, langstack, order
t0=time.time()
for s in map(int, a.seeds.split(",")):
    t=time.time()
    lok, mok, kok, lm, mm, ls, res, planted, losses, lst, order = run(s)
    print(f"seed {s} lang {'ok ' if lok else 'BAD'} {lm:.3f} mod {'ok ' if mok else 'BAD'} {mm:.3f} rule {'ok' if kok else 'BAD'} | {' '.join(f'{x:.3f}' for x in ls)} | loss {losses[0]:.4f} {sum(losses[-20:])/20:.5f} {time.time()-t:.1f}s", flush=True)
    if a.verbose:
        for st in ("encoder","decoder"): print("   ", st, [round(lst[st][l][0]/lst[st][l][1],3) for l in order], "  ".join(f"{'*' if k in planted else ''}{k[1]}={v:.3f}" for k,v in res.items() if k[0]==st))
