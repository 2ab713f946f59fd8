/** Preferences in the browser's storage: the API keys, the theme, and the last used model and settings. */

import { validSettings } from "./sampling.js";

const KEY = "moesaic.key";
/** Storage name of the administrator's key, which the chat does not use. */
export const ADMIN_KEY = "moesaic.admin-key";
const LAST_USED = "moesaic.last";
const THEME = "moesaic.theme"; // theme.js reads it before the first paint

/**
 * Returns a storage of the browser, or null if the reader has disabled it; then even the access throws.
 * @param {"localStorage" | "sessionStorage"} name
 * @returns {Storage | null}
 */
export function storage(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}

/**
 * @param {Storage | null} area
 * @param {string} name
 * @param {string} value
 */
export function put(area, name, value) {
  try {
    area?.setItem(name, value);
  } catch {
    // The storage is full. The page works without these values.
  }
}

/** @type {Map<string, string>} the keys of this page, in case nothing can be stored */
const keys = new Map();

/** @param {string} [name] storage name of the key @returns {string} the key; empty if there is none */
export function readKey(name = KEY) {
  return keys.get(name) ?? storage("sessionStorage")?.getItem(name) ?? storage("localStorage")?.getItem(name) ?? "";
}

/**
 * Stores the key, either until the tab is closed or permanently.
 * @param {string} key
 * @param {boolean} remember whether to store it permanently
 * @param {string} [name] storage name of the key
 */
export function writeKey(key, remember, name = KEY) {
  keys.set(name, key);
  for (const area of [storage("sessionStorage"), storage("localStorage")]) area?.removeItem(name);
  if (key) put(storage(remember ? "localStorage" : "sessionStorage"), name, key);
}

/** @returns {{model: string, settings: import("./sampling.js").Settings}} the defaults of the next conversation */
export function readLast() {
  try {
    const last = JSON.parse(storage("localStorage")?.getItem(LAST_USED) ?? "{}");
    return { model: typeof last.model === "string" ? last.model : "", settings: validSettings(last.settings ?? {}) };
  } catch {
    return { model: "", settings: {} };
  }
}

/** @param {import("./conversation.js").Conversation} conversation */
export function writeLast({ model, settings }) {
  put(storage("localStorage"), LAST_USED, JSON.stringify({ model, settings }));
}

/** @returns {string} light, dark, or system */
export function readTheme() {
  return document.documentElement.dataset.theme ?? "system";
}

/** @param {string} theme */
export function writeTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  put(storage("localStorage"), THEME, theme);
}
