// What every page of the console does beyond being read. Without any of this they can still be read.

import { watchCharts } from "./charts.js";
import { watchServer } from "./live.js";
import { watchOrders } from "./orders.js";
import { watchLinks } from "./swap.js";
import { watchTimes } from "./times.js";

if (document.getElementById("nav")) {
  watchTimes();
  watchLinks();
  watchOrders();
  watchCharts();
  watchServer();
}
document.documentElement.dataset.awake = ""; // until here a click would be lost, and buttons take none
