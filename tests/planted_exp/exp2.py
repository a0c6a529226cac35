import sys, time, argparse, torch, logging
logging.disable(logging.INFO)
import toy, planted
torch.set_num_threads(1)
ap = argparse.ArgumentParser()
for k, v in dict(seeds="0,1,2", updates=300, lr=0.01, sparsity=0.9, n=32, d=32, ffn=64, layers=2, size=2.0, begin=0.13, dur=0.67, noise=0.0, equal=0,
    enc="self_attn.v_proj,fc1", dec="encoder_attn.v_proj,fc2", length=5, rank=8, verbose=0, scope="layer",fresh=0,prank="1,2,4,8",betas="(0.9, 0.98)",wd=0.0).items():
    ap.add_argument("--"+k, type=type(v), default=v)
a = ap.parse_args()
def run(seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(4, generator=g).tolist()
    pr = list(map(int, a.prank.split(",")))
    ranks = [0]*4
    for r, l in zip(pr, order): ranks[l]=r
    common = dict(encoder_layers=a.layers, decoder_layers=a.layers, encoder_embed_dim=a.d, encoder_ffn_embed_dim=a.ffn)
    teacher = toy.build(seed=seed, **common, lora_rank=",".join(f"{c}={r}" for c, r in zip(toy.CODES, ranks)), encoder_target_modules=a.enc, decoder_target_modules=a.dec)
    planted.plant(teacher, a.size, g)
    if a.equal:
        with torch.no_grad():
            for lin in teacher.adapted_linears():
                for l, r in enumerate(ranks):
                    lin.factors(l)[1].mul_(a.size*2/lin.delta_weight(l).norm())
    student = toy.build(seed=seed, **common, lora_rank=str(a.rank))
    sd, td = student.state_dict(), teacher.state_dict()
    for k in td:
        if "adapters" not in k: assert torch.equal(sd[k], td[k]), k
    opt, args = planted.pruned_adam(student, a.lr, pruning_scope=a.scope, pruning_final_sparsity=a.sparsity, pruning_begin=int(a.begin*a.updates), pruning_duration=int(a.dur*a.updates), pruning_unit='update', adam_betas=a.betas, weight_decay=a.wd)
    t = teacher
    if a.noise:
        def t(**k):
            y = teacher(**k)[0]
            return (y + a.noise*torch.randn(y.shape, generator=g),)
    losses = planted.learn(student, t, opt, a.updates, a.n, a.length, g)
    lang = [[0,0] for _ in range(4)]; mods={}
    ls_ = {"encoder":[[0,0] for _ in range(4)],"decoder":[[0,0] for _ in range(4)]}
    for lin in student.adapted_linears():
        for l in range(4):
            m = lin.masks(l)[1]
            k, n = m.sum().item(), m.numel()
            e = mods.setdefault((lin.site.stack, lin.site.module), [0,0])
            for x in (lang[l], e, ls_[lin.site.stack][l]): x[0]+=k; x[1]+=n
    share = lambda x: x[0]/x[1]
    ls = [share(lang[l]) for l in order]
    pl = {("encoder",m) for m in a.enc.split(",")} | {("decoder",m) for m in a.dec.split(",")}
    res = {k: share(v) for k,v in mods.items()}
    lm = min(y-x for x,y in zip(ls, ls[1:]))
    mm = [min(res[k] for k in res if k[0]==s and k in pl)-max(res[k] for k in res if k[0]==s and k not in pl) for s in ("encoder","decoder")]
    gaps = {}
    for s in ("encoder","decoder"):
        o = share([sum(v[i] for k,v in mods.items() if k[0]==s) for i in (0,1)])
        gaps[s] = (min(res[k] for k in res if k[0]==s and k in pl)/o, max(res[k] for k in res if k[0]==s and k not in pl)/o)
    return lm, mm, gaps, ls, res, pl, losses, ls_, order
tot=[0,0,0]; mins=[9,9,9,9,-9,-9]; n=0; ta=time.process_time()
for s in eval(f"range({a.seeds})") if ":" not in a.seeds and "r" in a.seeds else list(map(int, a.seeds.split(","))) if ":" not in a.seeds else range(*map(int,a.seeds.split(":"))):
    t=time.time()
    lm, mm, gaps, ls, res, pl, losses, lst, order = run(s)
    rule = all(g[0]>=.5>g[1] for g in gaps.values())
    tot[0]+=lm>0; tot[1]+=min(mm)>0; tot[2]+=rule; n+=1
    mins[0]=min(mins[0],lm); mins[1]=min(mins[1],mm[0]); mins[2]=min(mins[2],mm[1]); mins[3]=min(mins[3],*(g[0] for g in gaps.values())); mins[4]=max(mins[4],gaps["encoder"][1]); mins[5]=max(mins[5],gaps["decoder"][1])
    if a.verbose:
        print(f"seed {s} lang {'ok ' if lm>0 else 'BAD'} {lm:.3f} mod {'ok ' if min(mm)>0 else 'BAD'} {mm[0]:.3f} {mm[1]:.3f} rule {'ok' if rule else 'BAD'} | {' '.join(f'{x:.3f}' for x in ls)} | loss {losses[0]:.4f} {sum(losses[-20:])/20:.5f} {time.time()-t:.1f}s", flush=True)
    if a.verbose>1:
        for st in ("encoder","decoder"): print("   ", st, [round(lst[st][l][0]/lst[st][l][1],3) for l in order], "  ".join(f"{'*' if k in pl else ''}{k[1]}={res[k]:.3f}" for k in sorted(res, key=lambda k:-res[k]) if k[0]==st))
print(f"lang {tot[0]}/{n} mod {tot[1]}/{n} rule {tot[2]}/{n} | min lang gap {mins[0]:.3f} mod gap enc {mins[1]:.3f} dec {mins[2]:.3f} | rel: planted min {mins[3]:.2f}, other max enc {mins[4]:.2f} dec {mins[5]:.2f} | loss {losses[0]:.4f} {sum(losses[-20:])/20:.5f} | {(time.process_time()-ta)/n:.1f}cpu-s/seed", flush=True)
