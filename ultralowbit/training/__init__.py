"""What needs gradients.

specs        what a recipe says of each stage that trains
loop         one resumable loop, which keeps what was best on held-out windows
estimators   how a gradient passes through a sign
objectives   what a block, or the whole model, is trained on
fake_quant/  packed weights as parameters, whose values are at every step those of the bytes they pack to
blockwise    a block's packed Linears, fitted to what the original block puts out
plain        norms and biases, which are trained but not packed
finetune     the packed model end to end
preprocess   low-rank adapters that restore a quantized model before it is quantized again
"""
