import assert from "node:assert/strict";
import test from "node:test";
import { newConversation, requestFor, titleOf } from "../../../../moesaic/serve/web/conversation.js";
import { exportAll, exportOne, ImportError, readFile } from "../../../../moesaic/serve/web/conversation-file.js";
import { clamp, validSettings } from "../../../../moesaic/serve/web/sampling.js";

const conversation = () =>
  newConversation({
    title: "Grüße",
    created: 1,
    updated: 2,
    model: "tiny",
    system: "Be brief.",
    settings: { temperature: 0.5 },
    messages: [
      { role: "user", content: "Hi </script>" },
      { role: "assistant", content: "Hello", cut: "stopped", cost: { prompt: 1, answer: 2, rate: null } },
    ],
  });

test("an exported conversation is imported under a new id", () => {
  const before = conversation();
  const [after] = readFile(exportAll([before]));
  assert.notEqual(after.id, before.id);
  assert.equal(after.revision, 0);
  const plain = before.messages.map(({ role, content }) => ({ role, content }));
  assert.deepEqual({ ...after, id: before.id }, { ...before, messages: plain });
  const [one] = readFile(exportOne(before));
  assert.deepEqual([one.title, one.system, one.messages], ["Hi </script>", "Be brief.", plain]);
});

test("damaged files are refused", () => {
  const bodies = [
    "", "{", "null", "3", "[]", "{}", '{"moesaic": 2, "messages": []}', '{"moesaic": 1}', '{"moesaic": 1, "conversations": {}}',
    '{"moesaic": 1, "conversations": [null]}', '{"moesaic": 1, "messages": [null]}', '{"moesaic": 1, "messages": ["x"]}',
    '{"moesaic": 1, "messages": [{"role": "user"}]}', '{"moesaic": 1, "messages": [{"role": "user", "content": 3}]}',
    '{"moesaic": 1, "messages": [{"role": "tool", "content": ""}]}', '{"moesaic": 1, "messages": [{"role": "system"}]}',
    '{"moesaic": 1, "messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]}',
  ]; // prettier-ignore
  for (const body of bodies) assert.throws(() => readFile(body), ImportError, body);
});

test("only known fields are imported", () => {
  const file = {
    moesaic: 1,
    id: "x",
    revision: 9,
    title: { toString: "x" },
    created: 1e300,
    updated: "now",
    model: 3,
    settings: { temperature: 99, top_k: "5", seed: 1.5, evil: 1, __proto__: { top_p: 0.5 } },
    messages: [{ role: "user", content: "a", evil: 1, cut: "<b>" }],
  };
  const [imported] = readFile(JSON.stringify(file));
  assert.deepEqual(imported.settings, { temperature: 2, seed: 2 });
  assert.deepEqual(imported.messages, [{ role: "user", content: "a" }]);
  assert.deepEqual([imported.revision, imported.model, imported.title], [0, "", "a"]);
  assert.ok(Math.abs(imported.created - Date.now()) < 1e6);
  const [odd] = readFile('{"moesaic": 1, "messages": [], "settings": [1], "__proto__": {"system": "x"}}');
  assert.deepEqual([odd.settings, odd.system, odd.title], [{}, "", "Imported conversation"]);
});

test("settings are limited to their range", () => {
  assert.equal(clamp("temperature", -1), 0);
  assert.equal(clamp("top_k", 3.6), 4);
  assert.equal(clamp("max_tokens", 0), 1);
  for (const odd of [NaN, Infinity, "3", null, undefined, {}]) assert.equal(clamp("top_p", odd), null);
  assert.equal(clamp("toString", 1), null);
  assert.deepEqual(validSettings({ temperature: 0.7, top_p: 0.5 }), { top_p: 0.5 });
});

test("request for the next answer", () => {
  const body = requestFor(conversation());
  assert.equal(body.continue_final_message, true);
  assert.equal(body.add_generation_prompt, false);
  assert.deepEqual(body.messages[0], { role: "system", content: "Be brief." });
  assert.deepEqual([body.temperature, body.top_k, "seed" in body], [0.5, 0, false]);
  const asked = requestFor(newConversation({ system: "  ", messages: [{ role: "user", content: "a" }] }));
  assert.ok(!("continue_final_message" in asked));
  assert.deepEqual(asked.messages, [{ role: "user", content: "a" }]);
});

test("titles", () => {
  assert.equal(titleOf("  two\n\nlines "), "two lines");
  assert.equal(Array.from(titleOf("🐇".repeat(90))).length, 61);
  assert.ok(!titleOf("x".repeat(1e6)).includes("\n"));
});
