// attention: causal attention of a step's queries over the paged cache; decodes and chunks of prompts in one launch.
//
// A block is one KV head (blockIdx.x) of one item (blockIdx.y) of the work list that plan.py makes, longest first. Long items
// are split along the tokens; then merge.cu puts their parts together.
#include "decode.cuh"
#ifdef WGMMA
#include "prompt_wgmma.cuh"
#else
#include "prompt.cuh"
#endif

union Shared {
  DecodeShared decode;
  PromptShared prompt;
};

KERNEL(attention) {
  SHARED(Shared, shared);
  if (static_cast<int>(blockIdx.y) >= arguments.counts[0]) return;  // the grid of a recorded graph has room to spare
  const Item item = load_item(arguments.items, blockIdx.y, blockIdx.x);
  if (item.is_prompt)
    attend_prompt(shared.prompt, arguments, item);
  else
    attend_decode(shared.decode, arguments, item);
}
