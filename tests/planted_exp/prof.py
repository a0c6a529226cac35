import sys; sys.argv=['exp.py','--n','64','--length','5','--updates','150','--seeds','0','--layers','1','--dec','encoder_attn.v_proj,fc1']
import torch,toy,planted,time
import torch._dynamo
import cProfile,pstats
p=cProfile.Profile(time.process_time); p.enable(); exec(open('/tmp/planted_exp/exp2.py').read()); p.disable()
pstats.Stats(p).sort_stats('cumtime').print_stats('planted|toy|optim|pruning|lslora|autograd|engine')
