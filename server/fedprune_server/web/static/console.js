// What every page of the console does beyond being read. Without any of this they can still be read.

import { watchCharts } from "./charts.js";
import { watchKeys } from "./keys.js";
import { watchServer } from "./live.js";
import { watchOrders } from "./orders.js";
import { watchLinks } from "./swap.js";
import { watchTheme } from "./theme.js";
import { watchTimes } from "./times.js";

watchTheme();
if (document.getElementById("nav")) {
  watchTimes();
  watchLinks();
  watchKeys();
  watchOrders();
  watchCharts();
  watchServer();
}
document.documentElement.dataset.awake = ""; // until here a click would be lost, and buttons take none
