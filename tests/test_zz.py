import torch
from torch import nn
from torch.nn import functional as F
from dotresize_fx.passes.drop_no_ops import DropNoOps
from dotresize_fx.passes.recognise_linears import RecogniseLinears
from dotresize_fx.passes.recognise_norms import RecogniseNorms
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.insert_maps import *
from dotresize_fx.passes.fold_linears import *
from dotresize_fx.passes.fold_norm_gains import *
from dotresize_fx.passes.centre_layer_norms import *
from dotresize_fx.region_map import *
class A(nn.Module):
    def __init__(s):
        super().__init__(); s.up=nn.Linear(4,8); s.down=nn.Linear(8,4,bias=False)
    def forward(s,x):
        return x+s.down(F.dropout(torch.relu(s.up(x)).to(torch.float32).contiguous(),.1,s.training))
class C(nn.Module):
    def __init__(s):
        super().__init__(); s.weight=nn.Parameter(torch.zeros(4,6)); s.bias=nn.Parameter(torch.zeros(6))
    def forward(s,x):
        return torch.addmm(s.bias,x.view(-1,4),s.weight).view(x.shape[0],x.shape[1],6)
class R(nn.Module):
    def __init__(s):
        super().__init__(); s.weight=nn.Parameter(torch.zeros(4))
    def forward(s,x):
        h=x.to(torch.float32)
        return s.weight*(h*torch.rsqrt(h.pow(2).mean(-1,keepdim=True)+1e-6)).to(x.dtype)
class S(nn.Module):
    def __init__(s, norm=nn.RMSNorm, tied=True):
        super().__init__(); s.table=nn.Embedding(7,4); s.n=norm(4); s.gate=nn.Linear(4,6); s.up=nn.Linear(4,6); s.down=nn.Linear(6,4); s.final=norm(4); s.head=nn.Linear(4,7,bias=False)
        if tied: s.head.weight=s.table.weight
    def forward(s,ids):
        x=s.table(ids); h=s.n(x)
        x=x+s.down(F.silu(s.gate(h))*s.up(h))
        return s.head(s.final(x))
def test_a(trace,text,run):
    for m in (A(),C(),R()):
        g=trace(m,(2,3,4)); print(text(g)); print()
        for p in (DropNoOps(),RecogniseLinears(),RecogniseNorms()): print(p(g))
        print(text(g)); print()
    for norm in (nn.RMSNorm,nn.LayerNorm):
        g=trace(S(norm),(2,3),dtype=torch.int64); print(text(g)); print()
        for P in (FoldNormGains,CentreLayerNorms):
            r=[r for r in find_regions(g).regions if r.kind=='residual'][0]; print(r)
            print(P(r)(g)); print(text(g)); print()
        for r in find_regions(g).regions:
            i=InsertMaps(r,random_admissible_map(r,torch.Generator())); print(i(g)); print(text(g)); print(FoldLinears(i.downs,i.ups)(g))
    assert 0
