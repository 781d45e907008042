// What the file of each instruction set includes after its vectors: all kernels, compiled once for each.
// No standard header with inline functions may come in here (parallel.h says why).
#include "parallel.h"

#include "functions.h"
#include "micro.h"
#include "shuffle.h"
#include "spans.h"

#include "gemm.h"
#include "quantise.h"

#include "attention.inl.h"
#include "attention_codes.inl.h"
#include "attention_single.inl.h"
#include "attention_heads.inl.h"
#include "attention_backward.inl.h"
#include "ceilings.inl.h"
#include "convert.inl.h"
#include "cross_entropy.inl.h"
#include "linear.inl.h"
#include "norm.inl.h"
#include "patch_embed.inl.h"
#include "probe.inl.h"
#include "top_k.inl.h"
#include "weight_only.inl.h"
#include "decoder_step.inl.h"  // of those above
