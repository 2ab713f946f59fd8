/**
 * Saves answers in progress when the page is closed. There is no time for IndexedDB then, so the page writes them to
 * localStorage, and the next page moves them into the store.
 */

import { put, storage } from "./preferences.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

const PREFIX = "moesaic.rescue.";

/** Saves a conversation with unsaved changes. @param {Conversation} conversation */
export function rescue(conversation) {
  put(storage("localStorage"), PREFIX + conversation.id, JSON.stringify(conversation));
}

/**
 * Moves the conversations that earlier pages saved into the store.
 * @param {import("./store.js").Store} store
 */
export async function recover(store) {
  const area = storage("localStorage");
  for (const name of Object.keys(area ?? {}).filter((name) => name.startsWith(PREFIX))) {
    /** @type {Conversation} */
    const rescued = JSON.parse(area?.getItem(name) ?? "null");
    area?.removeItem(name);
    const stored = await store.get(rescued.id);
    // If another tab has deleted or continued the conversation, that version wins.
    if (stored ? stored.revision !== rescued.revision && !continues(rescued, stored) : rescued.revision > 0) continue;
    await store.save({ ...rescued, revision: stored?.revision ?? 0 });
  }
}

/**
 * @param {Conversation} rescued
 * @param {Conversation} stored
 * @returns {boolean} whether `rescued` is `stored` with more text in its last answer
 */
function continues(rescued, stored) {
  const last = rescued.messages.length - 1;
  const count = stored.messages.length;
  if (count !== last && count !== last + 1) return false;
  return rescued.messages[last].content.startsWith(count === last ? "" : stored.messages[last].content);
}
