// node llama_cpp.mjs CASES FOUND: what llama.cpp makes of GGUF files. CASES is [{path, texts, rows: [{ids, steps}]}];
// FOUND has of each file the token ids of every text, and of each row the probabilities of its next token and, greedily,
// so many more tokens.
import fs from "node:fs";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const found = [];
for (const file of JSON.parse(fs.readFileSync(process.argv[2], "utf8"))) {
  const model = await llama.loadModel({ modelPath: file.path });
  const context = await model.createContext({ contextSize: 256, threads: 1 });
  const rows = [];
  for (const { ids, steps } of file.rows) {
    const sequence = context.getSequence();
    const input = ids.map((id, place) => (place + 1 < ids.length ? id : [id, { generateNext: { probabilities: true } }]));
    const next = (await sequence.controlledEvaluate(input)).at(-1).next.probabilities;
    await sequence.clearHistory();
    const written = [];
    for await (const id of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
      written.push(id);
      if (written.length === steps) break;
    }
    rows.push({ probabilities: [...next], written });
    sequence.dispose();
  }
  found.push({ texts: file.texts.map((text) => [...model.tokenize(text, false)]), rows });
  await context.dispose();
  await model.dispose();
}
fs.writeFileSync(process.argv[3], JSON.stringify(found));
process.exit(0);
