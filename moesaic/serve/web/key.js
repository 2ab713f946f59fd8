/** The dialog for the API key. */

import { byId } from "./dom.js";
import { readKey, writeKey } from "./preferences.js";

/**
 * Shows the dialog and returns whether the reader entered a key.
 * @param {string} reason
 * @param {string} [name] storage name of the key, as in preferences.js
 * @returns {Promise<boolean>}
 */
export function askKey(reason, name) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("key-dialog"));
  if (dialog.open) return Promise.resolve(false); // several requests can fail at the same time
  const input = /** @type {HTMLInputElement} */ (byId("key"));
  const remember = /** @type {HTMLInputElement} */ (byId("key-remember"));
  byId("key-reason").textContent = reason;
  input.value = readKey(name);
  dialog.showModal();
  input.select();
  return new Promise((resolve) => {
    let entered = false;
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      entered = true;
      writeKey(input.value.trim(), remember.checked, name);
      dialog.close();
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      input.value = "";
      resolve(entered);
    };
  });
}
